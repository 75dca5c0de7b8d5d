"""What a file or a key cannot do: run code, lead out of its folder, take a machine's time, or leak a secret.

The op cache: tests/native/test_trust.py. Secrets of the environment: tests/driver/test_launch.py. The state of a
checkpoint: tests/engine/test_manifest.py. Which calls may load what: tests/test_house_rules.py.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model

from dataflex.config import load_config
from dataflex.config.schema import Config, DataSection, MethodSection, ModelSection
from dataflex.data.encoding.template import get_template
from dataflex.data.sources.expression import Expression
from dataflex.data.sources.info import read_dataset_infos
from dataflex.data.sources.read import read_rows
from dataflex.data.weight_file import WeightFile
from dataflex.engine.models.adapter import with_adapter_keys
from dataflex.engine.models.handover import handover
from dataflex.engine.models.model import load_model, load_model_config, load_tokenizer
from dataflex.scoring.kept.store import ShardStore, StoreReader
from dataflex.utils.errors import UserError
from dataflex.utils.records import FileRecord, write_sealed
from tests.tiny import byte_tokenizer, tiny_llama

BASE = {"model_name_or_path": "some/model", "dataset": "a", "output_dir": "out", "template": "default"}


class Planted:
    """Pickled, it makes a file named `planted` in the working folder of whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "planted").exists(), "code of a file was run"


def test_the_plant_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted()))
    (tmp_path / "planted").rmdir()


def test_pickles_in_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([Planted()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a .npy file"):
        WeightFile(str(tmp_path / "w.npy"))
    store = ShardStore(tmp_path / "s", {"a": "b"}, np.arange(2, dtype=np.int64), 4)
    store.write(0, {"scores": np.zeros(2)})
    (tmp_path / "w.npy").replace(tmp_path / "s" / "scores-00000.npy")
    content = json.loads((tmp_path / "s" / "manifest.json").read_text())
    del content["seal"]
    content["shards"]["0"]["files"]["scores"] |= FileRecord.of(tmp_path / "s" / "scores-00000.npy").model_dump()
    write_sealed(tmp_path / "s" / "manifest.json", content)
    with pytest.raises(UserError, match="cannot be read as a .npy file"):
        StoreReader(tmp_path / "s").read(0, "scores")


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.python.unknown"])
def test_pickles_in_tables(tmp_path: Path, name: str) -> None:
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickle.dumps(Planted())}
    schema = pa.schema([pa.field("instruction", pa.string(), metadata=metadata)])
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), schema) as writer:
        writer.write_table(pa.table({"instruction": pa.array(["a"])}, schema=schema))
    assert [row for _, row in read_rows(tmp_path / "d.arrow", {"instruction"})] == [{"instruction": "a"}]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [planted]",
        "!!python/object/new:os.mkdir [planted]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!planted x",
    ],
)
def test_tags_of_yaml(tmp_path: Path, value: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {value}\n")
    with pytest.raises(UserError, match="run.yaml:1: not valid YAML: could not determine a constructor for the tag"):
        load_config(tmp_path / "run.yaml")


def test_aliases_that_stand_for_billions_of_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    for last in ("dataset: *a11", "deepspeed: {x: *a11}"):
        (tmp_path / "run.yaml").write_text("\n".join([*lines, last]))
        begin = time.monotonic()
        with pytest.raises(UserError, match="its aliases stand for more than 100,000 values"):
            load_config(tmp_path / "run.yaml")
        assert time.monotonic() - begin < 5
    (tmp_path / "run.yaml").write_text("deepspeed: &a {x: *a}")
    with pytest.raises(UserError, match="its aliases stand for more than"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "w.__class__ * 1",
        "().__class__.__bases__[0]",
        "__import__('os').mkdir('planted') * w",
        "(lambda: w)() * 1",
        "[w for w in (1,)] * w",
        "w if w > 1 else 2",
        "(w := 1) * 2",
        "'a' * w",
        "f'{w}' * 2",
        "exec('1') + w",
        "open('planted') * w",
        "max.__call__(w, 1)",
        "w @ w",
        "w << 9",
    ],
)
def test_expressions_are_arithmetic_only(text: str) -> None:
    with pytest.raises(UserError, match="^sample_weight: "):
        Expression(text)


def test_expressions_take_no_time() -> None:
    begin = time.monotonic()
    for text in ("w * 9**9**9", "w ** 9 ** 9 ** 9", "exp(exp(exp(exp(w))))", "w * 9**9999999"):
        assert not np.isfinite(Expression(text)({"w": 9.0}))
    for text in ("w" + " + w" * 100_000, "(" * 5000 + "w" + ")" * 5000, "w * " + "9" * 10_000, "-" * 50_000 + "w"):
        with pytest.raises(UserError):
            Expression(text)({"w": 1.0})
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "..", "a\0b.json", "x" * 300 + ".json", "x/" * 3000])
def test_files_of_datasets_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": name}}))
    with pytest.raises(UserError, match="d.file_name: .*(leads out of|can be no file)"):
        read_dataset_infos(["d"], tmp_path)


@pytest.mark.parametrize("key", ["script_url", "cloud_file_name"])
def test_foreign_code_and_places_are_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {key: "x"}}))
    with pytest.raises(UserError, match=f"d.{key}: not supported"):
        read_dataset_infos(["d"], tmp_path)


def model_folder(folder: Path) -> Config:
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Config(model=ModelSection(model_name_or_path=str(folder)), data=DataSection(template="default"))


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    cfg = model_folder(tmp_path / "m")
    assert Config().model.trust_remote_code is False
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "m" / "own.py").write_text("import os\nos.mkdir('planted')\n")
    with pytest.raises(UserError, match="model_name_or_path: no model config at"):
        load_model_config(cfg)


def test_pickles_in_weights(tmp_path: Path) -> None:
    cfg = model_folder(tmp_path / "m")
    for path in (tmp_path / "m").glob("*.safetensors"):
        path.unlink()
    torch.save({"model.norm.weight": Planted()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="model_name_or_path: no fitting weights at"):
        load_model(cfg, load_model_config(cfg), load_tokenizer(cfg))


MODEL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
DAMAGED = [b"", b"{", b"[1]", b"\xff" * 8, b"[" * 50_000]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_a_model_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    cfg = model_folder(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^model_name_or_path: [^\n]+$"):
        model_config, tokenizer = load_model_config(cfg), load_tokenizer(cfg)
        handover(cfg, model_config)
        load_model(cfg, model_config, tokenizer)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_an_adapter_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    model = model_folder(tmp_path / "m").model
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    model = model.model_copy(update={"adapter_name_or_path": str(tmp_path / "a")})
    cfg = Config(model=model, data=DataSection(), method=MethodSection(finetuning_type="lora"))
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^adapter_name_or_path: [^\n]+$"):
        cfg = with_adapter_keys(cfg)
        load_model(cfg, load_model_config(cfg), load_tokenizer(cfg))


FURTHER = [
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", [*FURTHER, "additional_chat_templates"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff" * 8, b"{% for", b"{{ 1 + 'a' }}"])
def test_damaged_further_files_of_a_tokenizer_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    """tokenizer.json has all that it needs: what else lies there is read by some classes, or not at all."""
    cfg = model_folder(tmp_path / "m")
    path = tmp_path / "m" / name
    if name == "additional_chat_templates":
        path.mkdir()
        path = path / "tools.jinja"
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(cfg)
        get_template(None, tokenizer, None, None).pairs([("user", "a"), ("assistant", "b")], "x:1", False)
    except UserError as error:
        assert "\n" not in str(error)


SECRET = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name_or_path", f"https://user:{SECRET[3:]}@host/model"),
        ("model_name_or_path", f"https://:{SECRET[3:]}@host/model"),
        ("run_name", SECRET),
        ("dataset", ["a", SECRET]),
        ("deepspeed", {"comet": {"enabled": True, "api_key": SECRET}}),
        ("deepspeed", {"x": {"y": {"PASSWORD": SECRET}}}),
        ("deepspeed", {"x": ["a", {"y": f"wandb {SECRET}"}]}),
        ("component_params", {"mix": {"endpoint": f"https://user:{SECRET[3:]}@host"}}),
        ("component_params", {"mix": {"judges": [{"auth_token": SECRET[3:]}]}}),
        ("component_params", {"mix": {SECRET: 1}}),
        ("hub_token", SECRET),
        ("hf_hub_token", SECRET),
        ("wandb_api_key", SECRET),
    ],
)
def test_a_secret_in_a_configuration_is_neither_kept_nor_said(key: str, value: Any, capsys: Any) -> None:
    try:
        told = str(load_config({**BASE, key: value}).dump_flat())
    except UserError as error:
        told = str(error)
    assert SECRET[3:] not in told + "".join(capsys.readouterr())
