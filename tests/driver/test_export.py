"""What is exported stops as it was trained, and keeps all else that its source says: compared file by file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load_config
from dataflex.engine.models.adapter import with_adapter_keys
from dataflex.engine.models.handover import handover
from dataflex.engine.models.model import load_model_config
from dataflex.utils.errors import UserError
from tests.distributed import run_ranks
from tests.driver.workspace import TEMPLATE, settings
from tests.tiny import byte_tokenizer, tiny_llama

CHATML = ["<|im_start|>", "<|im_end|>"]
OWN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# transformers loads such a file, with a warning, but refuses to save it
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 99}
# What `save_pretrained` itself sets anew each time.
FORMAL = {"transformers_version", "dtype", "is_local", "local_files_only", "backend"}


def make_sources(folder: Path) -> None:
    """chatml/: a base model whose tokenizer knows ChatML's tokens, with odd settings; bare/: no generation config."""
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": CHATML})
    tokenizer.model_max_length, tokenizer.pad_token = 77, None
    tiny_llama(264, pad_token_id=None, use_cache=False, own_key="kept").save_pretrained(folder / "chatml")
    tokenizer.save_pretrained(folder / "chatml")
    path = folder / "chatml/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    (folder / "chatml/generation_config.json").write_text(json.dumps(GENERATION))
    tiny_llama().save_pretrained(folder / "bare")
    byte_tokenizer(TEMPLATE).save_pretrained(folder / "bare")
    (folder / "bare/generation_config.json").unlink()


CASES: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "template": "qwen"},
    "lora": {
        "template": "qwen",
        "lora_rank": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.25,
        "lora_target": "q_proj,v_proj",
    },
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "bare": {"finetuning_type": "full", "model_name_or_path": "bare", "template": "default"},
    "new tokens": {
        "finetuning_type": "full",
        "model_name_or_path": "bare",
        "template": "qwen",
        "new_special_tokens": CHATML,
    },
}


@pytest.fixture(scope="module")
def home(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained for two steps, in runs/, under a umask of 027."""
    folder = tmp_path_factory.mktemp("export")
    make_sources(folder)
    cases = {}
    for name, keys in CASES.items():
        source = str(folder / keys.get("model_name_or_path", "chatml"))
        cases[name] = settings(
            workspace, **{**keys, "model_name_or_path": source, "output_dir": None, "max_steps": 2, "deepspeed": None}
        )
    found = run_ranks("tests.driver.test_export:sweep_with_umask", 1, folder=str(folder), cases=cases)[0]
    assert {name: case.get("error") for name, case in found.items()} == dict.fromkeys(CASES)
    assert max(case["gap"] for case in found.values()) < 1e-4
    return folder


def sweep_with_umask(**arguments: Any) -> Any:
    from tests.driver.ranks import sweep

    os.umask(0o027)
    return sweep(**arguments)


def exported(home: Path, case: str) -> Path:
    return home / "runs" / case.replace(" ", "_")


def changed(source: Path, folder: Path, name: str) -> dict[str, Any]:
    """What differs in a JSON file, as it is in ``folder``; None for what is gone."""
    old, new = (json.loads(p.read_text()) if p.exists() else {} for p in (source / name, folder / name))
    keys = (old.keys() | new.keys()) - FORMAL
    return {key: new.get(key) for key in keys if key not in new or old.get(key) != new[key]}


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_named_template_comes_with_its_end_and_nothing_else_changes(home: Path, case: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    source, folder = home / "chatml", exported(home, case)
    end = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|im_end|>")
    assert changed(source, folder, "tokenizer_config.json") == {"eos_token": "<|im_end|>"}
    assert changed(source, folder, "tokenizer.json") == {}
    assert changed(source, folder, "generation_config.json") == {"eos_token_id": [end, 2]}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [end, 2]
    assert (folder / "config.json").exists() == (case == "full")
    if case == "full":
        assert changed(source, folder, "config.json") == {"eos_token_id": end}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.padding_side, tokenizer.model_max_length) == (end, "left", 77)
    assert tokenizer.pad_token is None
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_with_its_own_chat_template_all_stays(home: Path) -> None:
    source, folder = home / "chatml", exported(home, "freeze")
    names = ("tokenizer_config.json", "tokenizer.json", "generation_config.json", "config.json")
    assert {name: changed(source, folder, name) for name in names} == {name: {} for name in names}
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE


def test_a_source_without_generation_config_stays_so(home: Path) -> None:
    source, folder = home / "bare", exported(home, "bare")
    assert not (folder / "generation_config.json").exists()
    assert changed(source, folder, "config.json") == {}
    assert changed(source, folder, "tokenizer_config.json") == {}
    assert "Human: " in (folder / "chat_template.jinja").read_text()


def test_new_tokens_end_turns_too(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported(home, "new tokens")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids(CHATML)
    assert (start, end, len(tokenizer)) == (259, 260, 261)
    assert changed(home / "bare", folder, "config.json") == {"eos_token_id": 260, "vocab_size": 261}
    assert model.generation_config.eos_token_id == [260, 2] and model.get_input_embeddings().num_embeddings == 261
    assert tokenizer.eos_token_id == 260


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_code_of_the_model_card_answers(
    home: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is run as it stands; generation ends at the end of a turn, which is made the likeliest token."""
    import torch
    from transformers import LlamaForCausalLM

    code = (exported(home, case) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    forward = LlamaForCausalLM.forward
    steps: list[int] = []

    def ends_turns(self: Any, *args: Any, **more: Any) -> Any:
        steps.append(1)
        out = forward(self, *args, **more)
        out.logits = torch.full_like(out.logits, -9.0)
        out.logits[..., 260 if len(steps) == 3 else 65] = 9.0
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", ends_turns)
    monkeypatch.chdir(exported(home, case))
    exec(code, {})
    assert (len(steps), capsys.readouterr().out.count("\n")) == (3, 1)


def test_the_umask_decides_who_may_read(home: Path) -> None:
    modes = {
        str(path.relative_to(home)): stat.S_IMODE(path.stat().st_mode)
        for case in CASES
        for path in exported(home, case).rglob("*")
        if path.is_file()
    }
    assert any("model.safetensors" in name for name in modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o640} == {}


def adapted(home: Path, workspace: Path, **keys: Any) -> Any:
    adapter = {"adapter_name_or_path": str(exported(home, "lora"))}
    return with_adapter_keys(load_config(settings(workspace, **{**adapter, **keys}), quiet=True))


def test_an_adapter_brings_its_own_keys(home: Path, workspace: Path) -> None:
    """Those of the "lora" run: rank 4, alpha 12 (the defaults would be 8 and 16), on two modules."""
    found = adapted(home, workspace)
    assert (found.method.lora_rank, found.method.lora_scale_alpha, found.method.lora_dropout) == (4, 12, 0.25)
    assert found.method.lora_target == ("q_proj", "v_proj")
    again = load_config({**found.dump_flat(), "lora_target": "all"}, quiet=True)
    assert with_adapter_keys(again).dump_flat() == found.dump_flat()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"lora_rank": 8}, "^lora_rank: 8, but the adapter has 4 .adapter_name_or_path: '.*lora'.: drop the key, or"),
        (
            {"lora_alpha": 8, "lora_target": "q_proj"},
            "^lora_alpha: 8, but the adapter has 12; lora_target: q_proj, but the adapter has q_proj, v_proj",
        ),
        ({"additional_target": "norm"}, "^additional_target: norm, but the adapter has none "),
        ({"adapter_name_or_path": "nowhere"}, "^adapter_name_or_path: no fitting adapter at 'nowhere': "),
    ],
)
def test_a_lora_key_beside_another_adapter_is_refused(home: Path, workspace: Path, keys: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        adapted(home, workspace, **keys)


def made(source: Path, workspace: Path, **keys: Any) -> Any:
    cfg = load_config(settings(workspace, model_name_or_path=str(source), **keys), quiet=True)
    return handover(cfg, load_model_config(cfg))


def test_an_own_chat_template_that_renders_the_same_is_kept(home: Path, workspace: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "chatml")
    tokenizer.chat_template = OWN_CHATML
    tiny_llama(264, eos_token_id=[260, 2]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = made(tmp_path, workspace, template="qwen3_nothink")
    assert given.tokenizer.chat_template == OWN_CHATML
    assert given.stops == () and given.tokenizer.eos_token == "</s>", "the source stops there already"
    assert made(tmp_path, workspace, template="qwen").tokenizer.chat_template != OWN_CHATML


def test_an_eos_that_the_chat_template_writes_stays(home: Path, workspace: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "chatml")
    tokenizer.chat_template = "{{ eos_token }}" + OWN_CHATML
    tiny_llama(264).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = made(tmp_path, workspace)
    assert given.stops == (260, 2) and given.tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("source", "template", "line"),
    [
        ("bare", "empty", "template: answers end in no token: a model trained so does not learn a token to stop at"),
        ("bare", "qwen", "template: answers end in '<|im_end|>', which the tokenizer spells in 10 tokens: a model"),
        ("chatml", "qwen", ""),
        ("endless", None, "template: answers end in no token: "),
    ],
)
def test_an_answer_without_an_end_is_said_at_the_start(
    home: Path, workspace: Path, capsys: pytest.CaptureFixture[str], source: str, template: str | None, line: str
) -> None:
    if source == "endless":
        tiny_llama().save_pretrained(home / source)
        byte_tokenizer(TEMPLATE.replace("{{ eos_token }}", "\n")).save_pretrained(home / source)
    capsys.readouterr()
    made(home / source, workspace, template=template)
    said = [text for text in capsys.readouterr().err.splitlines() if "answers end in" in text]
    assert len(said) == bool(line) and line in "".join(said)
