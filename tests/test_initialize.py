"""`dataflex.initialize`: the three lines for an existing DeepSpeed loop, with own datasets, models and collators."""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import dataflex
from tests.distributed import run_ranks
from tests.tiny_engine import PadZero, ds_config, model, parameter_hash, samples

FLEX: dict[str, Any] = {
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 2,
    "update_step": 2,
    "update_times": 2,
    "seed": 3,
}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A plain map-style dataset."""

    def __init__(self, count: int, seed: int) -> None:
        self.rows = samples(count, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right padding, as a user writes it."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key, fill in (("input_ids", 0), ("labels", -100)):
        batch[key] = torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in rows])
    batch["attention_mask"] = (torch.arange(width) < torch.tensor([[len(row["input_ids"])] for row in rows])).long()
    return batch


class Bigram(nn.Module):
    """Returns a tensor of logits, not a Hugging Face output, and knows no attention mask."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(259, 16)
            self.head = nn.Linear(16, 259)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids))
        return logits


def _start(flex: Any, net: nn.Module | None = None, stage: int = 3, **more: Any) -> Any:
    data = {"train_dataset": Rows(40, 1), "eval_dataset": Rows(8, 2), "data_collator": collate}
    arguments = {"config": ds_config(stage), **data, **more}
    return dataflex.initialize(model=net or model(), dataflex=flex, **arguments)


def three_lines() -> dict[str, Any]:
    """The loop of the README, from a YAML file and from a mapping."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "less.yaml")
        path.write_text(yaml.safe_dump(FLEX))
        engine = _start(str(path))
        first = [engine.training_step(batch) for batch in engine.batches()]
    other = _start(FLEX)
    second = [other.training_step(batch) for batch in other.batches()]
    return {
        "losses": [first, second],
        "steps": engine.global_steps,
        "batch": engine.train_batch_size(),
        "stage": engine.zero_optimization_stage(),
        "module": type(engine.module).__name__,
        "eval": engine.evaluate(),
    }


def save_and_load(folder: str) -> dict[str, Any]:
    """Stop after step 3, go on in a new engine, and compare with a run that was not stopped."""
    whole = _start(FLEX)
    losses = [whole.training_step(batch) for batch in whole.batches()]
    first = _start(FLEX)
    begun = []
    for batch in first.batches():
        begun.append(first.training_step(batch))
        if first.global_steps == 3:
            first.save_checkpoint(folder, client_state={"note": "mine"})
            break
    second = _start(FLEX)
    _, state = second.load_checkpoint(folder)
    rest = [second.training_step(batch) for batch in second.batches()]
    return {
        "losses": [losses, begun + rest],
        "hashes": [parameter_hash(whole), parameter_hash(second)],
        "client_state": state,
    }


def plain_module() -> list[float]:
    """A model of one's own under LESS."""

    def without_mask(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        del batch["attention_mask"]
        return batch

    engine = _start(FLEX, Bigram(), stage=2, data_collator=without_mask)
    return [engine.training_step(batch) for batch in engine.batches()]


def domains_and_own_optimizer() -> dict[str, Any]:
    """Named datasets, mixed; the optimizer is the caller's; two evaluation sets."""
    net = model()
    config = {key: value for key, value in ds_config(1).items() if key != "optimizer"}
    engine = dataflex.initialize(
        model=net,
        config=config | {"zero_allow_untested_optimizer": True},
        optimizer=torch.optim.AdamW(net.parameters(), lr=1e-3),
        dataflex={"train_type": "dynamic_mix", "component_name": "random", "update_step": 1, "update_times": 3},
        train_dataset={"left": Rows(12, 1), "right": Rows(12, 2)},
        eval_dataset={"left": Rows(4, 3), "right": Rows(4, 4)},
        tokenizer=PadZero(),
    )
    losses = [engine.training_step(batch) for batch in engine.batches()]
    return {"losses": losses, "eval": sorted(engine.evaluate()), "names": engine.run.pool.domain_names}


def mistakes() -> dict[str, str]:
    """What is said about wrong use."""
    said = {}
    block = {**ds_config(2), "dataflex": {"update_stp": 3}}
    cases: dict[str, Any] = {
        "block key": lambda: _start(None, config=block),
        "two settings": lambda: _start(FLEX, config=block),
        "no settings": lambda: _start(None, config={**ds_config(2), "dataflex": 3}),
        "no file": lambda: _start(FLEX, config="ds_zero7.json"),
        "two configs": lambda: _start(FLEX, config_params={}),
        "auto": lambda: _start(FLEX, config={**ds_config(2), "gradient_clipping": "auto"}),
        "quantised": lambda: _start(FLEX, config={"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}),
        "boundary": lambda: _start(FLEX, config={**ds_config(2), "managed_gradient_accumulation": False}),
        "folder": lambda: _start({**FLEX, "output_dir": "/dev/null/out"}),
        "keyword": lambda: _start(FLEX, train_datset=1),
        "key": lambda: _start({**FLEX, "update_stp": 3}),
        "collator": lambda: _start(FLEX, data_collator=None),
        "no length": lambda: _start(FLEX, train_dataset=iter([])),
        "empty": lambda: _start(FLEX, train_dataset=[]),
        "masked": lambda: _start(FLEX, eval_dataset=[{"input_ids": [1, 2], "labels": [-100, -100]}]),
        "no eval": lambda: _start({}, eval_dataset=None).evaluate(),
        "rows": lambda: next(iter(_start({}, data_collator=lambda rows: collate(rows[:1])).batches())),
        "skipped": lambda: list(_start(FLEX).batches()),
        "target": lambda: _start(FLEX, eval_dataset=None),
    }
    for name, case in cases.items():
        try:
            case()
            said[name] = "nothing"
        except (ValueError, TypeError, RuntimeError) as exc:
            said[name] = f"{type(exc).__name__}: {exc}"
    return said


def settings(folder: str) -> dict[str, Any]:
    """Weighting into a folder that is not there yet, and the settings as a block of the DeepSpeed JSON."""
    home = Path(folder)
    flex = {"train_type": "dynamic_weight", "component_name": "loss", "logging_steps": 1, "max_steps": 3}
    out = home / "not" / "there" / "yet"
    engine = _start({**flex, "output_dir": str(out)}, stage=2)
    by_argument = [engine.training_step(batch) for batch in engine.batches()]
    torch.distributed.barrier()  # rank 0 writes
    lines = (out / "weights.jsonl").read_text().splitlines()

    block = home / "ds.json"
    if torch.distributed.get_rank() == 0:
        text = yaml.safe_load(json.dumps({**ds_config(2), "dataflex": flex}))
        block.write_text("// with a comment, as DeepSpeed allows\n" + json.dumps(text))
    torch.distributed.barrier()
    given: dict[str, Any] = {"train_dataset": Rows(40, 1), "data_collator": collate}
    starts = {
        "file": lambda: dataflex.initialize(model=model(), config=str(block), **given),
        "mapping": lambda: dataflex.initialize(model=model(), config={**ds_config(2), "dataflex": flex}, **given),
        "args": lambda: dataflex.initialize(
            model=model(), args=argparse.Namespace(deepspeed_config=str(block)), **given
        ),
    }
    by_block = {name: [e.training_step(b) for b in e.batches()] for name, e in ((n, s()) for n, s in starts.items())}
    return {"lines": len(lines), "argument": by_argument, "block": by_block}


def test_the_three_lines_train_by_plan_and_pass_the_rest_through() -> None:
    ranks = run_ranks("tests.test_initialize:three_lines", 2)
    result = ranks[0]
    assert result["losses"][0] == result["losses"][1] == ranks[1]["losses"][0]
    assert len(result["losses"][0]) == result["steps"] == 6
    assert (result["batch"], result["stage"], result["module"]) == (4, 3, "LlamaForCausalLM")
    assert result["eval"] == ranks[1]["eval"] and 0 < result["eval"]["eval_loss"] < 10


def test_a_loop_of_ones_own_resumes_exactly(tmp_path: Path) -> None:
    result = run_ranks("tests.test_initialize:save_and_load", 2, folder=str(tmp_path))[0]
    assert result["losses"][0] == result["losses"][1]
    assert result["hashes"][0] == result["hashes"][1]
    assert result["client_state"] == {"note": "mine"}


def test_a_plain_module_that_returns_logits_works() -> None:
    losses = run_ranks("tests.test_initialize:plain_module", 1)[0]
    assert len(losses) == 6 and min(losses[1:]) < losses[0] < 6.5


def test_domains_and_an_optimizer_of_ones_own() -> None:
    result = run_ranks("tests.test_initialize:domains_and_own_optimizer", 1)[0]
    assert len(result["losses"]) == 3
    assert result["names"] == ["left", "right"]
    assert result["eval"] == ["eval_left_loss", "eval_loss", "eval_right_loss"]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    result: dict[str, str] = run_ranks("tests.test_initialize:mistakes", 1)[0]
    return result


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keyword", "TypeError: .*unexpected keyword.*train_datset"),
        ("key", "UserError: .*update_stp.*did you mean 'update_step'"),
        ("collator", "UserError: initialize: pass data_collator, or a tokenizer with a pad token"),
        ("no length", "UserError: train_dataset: .* has no length"),
        ("empty", "UserError: train_dataset: is empty"),
        ("masked", "UserError: eval_dataset: all 1 samples are masked"),
        ("no eval", "UserError: evaluate: no eval_dataset was given"),
        ("rows", "UserError: data_collator: got 2 samples, returned 1"),
        ("skipped", r"RuntimeError: call engine.training_step\(batch\) once for each batch"),
        ("block key", "UserError: config:dataflex:update_stp: .*did you mean 'update_step'"),
        ("two settings", "UserError: config:dataflex: dataflex is configured twice, there and by dataflex=; keep one"),
        ("no settings", "UserError: config:dataflex: expected a block of keys, got 3"),
        ("no file", "UserError: config: there is no DeepSpeed config 'ds_zero7.json'"),
        ("two configs", "UserError: config: the DeepSpeed config is needed once, got config, config_params"),
        ("auto", 'UserError: config: "auto" of gradient_clipping is filled in by the YAML of dataflex-cli only'),
        ("quantised", "UserError: config: 'zero_optimization.zero_quantized_weights' is not supported"),
        ("boundary", "UserError: config: 'managed_gradient_accumulation' must be true"),
        ("folder", "UserError: output_dir: cannot write to '/dev/null/out'"),
        ("target", "UserError: .*less needs a target|UserError: .*eval_dataset"),
    ],
)
def test_wrong_use_is_said(said: dict[str, str], name: str, text: str) -> None:
    import re

    assert re.search(text, said[name]), said[name]


@pytest.mark.parametrize("world_size", [1, 2])
def test_settings_in_the_deepspeed_config_and_an_output_dir_to_be_made(world_size: int, tmp_path: Path) -> None:
    for result in run_ranks("tests.test_initialize:settings", world_size, folder=str(tmp_path)):
        assert result["lines"] == 3 and len(result["argument"]) == 3
        assert result["block"] == dict.fromkeys(("file", "mapping", "args"), result["argument"])


def test_a_config_in_base64_may_be_longer_than_a_file_name() -> None:
    from dataflex.train.trainer.initialize import _read

    config = {"train_micro_batch_size_per_gpu": 2, "note": "x" * 6000}
    assert _read(base64.urlsafe_b64encode(json.dumps(config).encode()).decode(), "config") == config
