"""Pretrained models come in eval mode: every module is in train mode from the first step, and after whatever passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import dataflex
from dataflex.config import load_config
from dataflex.core.hook import Hook
from dataflex.driver.setup import build_engine, read_inputs, with_components
from dataflex.report.trainer_log import LogHook
from dataflex.train.trainer.run_hooks import EvalHook
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.driver.workspace import TEMPLATE, make_workspace, settings
from tests.tiny import byte_tokenizer

SAVE_AT = 2
LESS: dict[str, Any] = {
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 1,
    "update_step": 2,
    "update_times": 1,
    "eval_dataset": ["target"],
    "max_steps": None,
}
REFERENCE: dict[str, Any] = {
    "train_type": "dynamic_mix",
    "component_name": "doremi",
    "finetuning_type": "full",
    "update_step": 1,
    "train_step": 3,
    "max_steps": None,
}


class Watch(Hook):
    """Notes at which event a module is not in train mode, and each step's forwards of one block's MLP."""

    def __init__(self) -> None:
        self.lapses: list[str] = []
        self.forwards: list[int] = []
        self.counting = False

    def look(self, run: Any, event: str) -> None:
        self.lapses += [f"{event} {run.step}: {n}" for n, m in run.engine.module.named_modules() if not m.training]

    def on_train_start(self, run: Any) -> None:
        self.look(run, "train start")
        mlp = next(m for name, m in run.engine.module.named_modules() if name.endswith(".0.mlp"))
        mlp.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        if self.counting:
            self.forwards[-1] += 1

    def on_phase_start(self, run: Any, phase: Any, plan: Any) -> None:
        self.look(run, "phase start")

    def on_step_start(self, run: Any, batch: Any) -> None:
        self.look(run, "step start")
        self.forwards.append(0)
        self.counting = True

    def on_losses(self, run: Any, micro: Any, losses: Any, outputs: Any) -> None:
        self.look(run, "losses")

    def on_step_end(self, run: Any, batch: Any) -> None:
        self.counting = False
        self.look(run, "step end")


def start(folder: Path, **keys: Any) -> tuple[Any, Watch]:
    """The engine of a YAML run, evaluated after each step."""
    path = folder / f"run{torch.distributed.get_rank()}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **{"gradient_accumulation_steps": 2, **keys})))
    inputs = read_inputs(with_components(load_config(path, quiet=True)))
    watch = Watch()
    hooks = [EvalHook(1, LogHook(1))] if inputs.data.eval is not None else []
    return build_engine(inputs, [watch, *hooks]), watch


def yaml_runs(folder: str) -> dict[str, Any]:
    """Lapses and forwards of runs with checkpointing and without, that select, evaluate and ask a reference."""
    place, few = Path(folder), {"lora_target": tiny.FEW_TARGETS}
    cases = {
        "less": {**LESS, **few, "finetuning_type": "lora"},
        "plain": {**few, "finetuning_type": "lora", "disable_gradient_checkpointing": True, "max_steps": 1},
        "reference": {**REFERENCE, "reference_model_path": str(place / "model")},
    }
    found = {}
    for name, keys in cases.items():
        engine, watch = start(place, **keys)
        for batch in engine.batches():
            engine.training_step(batch)
        found[name] = {"lapses": watch.lapses[:5], "forwards": watch.forwards}
    return found


def resumed(folder: str) -> dict[str, Any]:
    """Losses and parameters of a GPT-2 with its dropout of 0.1, whole, resumed, and without the dropout."""
    place = Path(folder)
    keys = {**LESS, "model_name_or_path": str(place / "gpt2"), "finetuning_type": "full"}
    engine, _ = start(place, **keys)
    losses = []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        if engine.run.step == SAVE_AT:
            engine.save_checkpoint(place / "saved")
    fresh, watch = start(place, **keys)
    fresh.load_checkpoint(place / "saved")
    tail = [fresh.training_step(batch) for batch in fresh.batches()]
    hashes = [tiny.parameter_hash(engine), tiny.parameter_hash(fresh)]
    dry, _ = start(place, **{**keys, "model_name_or_path": str(place / "dry")})
    first = dry.training_step(next(iter(dry.batches())))
    return {"losses": losses, "tail": tail, "hashes": hashes, "lapses": watch.lapses[:5], "without dropout": first}


def in_a_loop_of_ones_own(folder: str) -> list[Any]:
    """Modes of a pretrained model, one module of which was put in eval, at each step of a user's loop."""
    net = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "gpt2"))
    came = net.training
    engine = dataflex.initialize(
        model=net,
        config=tiny.ds_config(2),
        dataflex={"train_step": 2},
        train_dataset=tiny.samples(16, seed=1),
        eval_dataset=tiny.samples(4, seed=2),
        tokenizer=tiny.PadZero(),
    )
    modes = []
    for batch in engine.batches():
        modes.append(all(m.training for m in engine.module.modules()))
        engine.training_step(batch)
        modes.append(all(m.training for m in engine.module.modules()))
        engine.module.eval()
        engine.evaluate()
        engine.scorer.gradient_features(tiny.samples(4, seed=3), proj_dim=64, seed=1)
    return [came, modes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_workspace(tmp_path_factory.mktemp("mode"))
    (made / "out").mkdir()
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for name, changes in {"gpt2": {}, "dry": dry}.items():
        torch.manual_seed(0)
        net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **changes))
        net.save_pretrained(made / name)
        byte_tokenizer(TEMPLATE).save_pretrained(made / name)
    return made


def test_every_module_trains_from_the_first_step(folder: Path) -> None:
    """A block runs twice for each of two micro-batches where its activations are recomputed, else once."""
    for rank in run_ranks("tests.engine.test_mode:yaml_runs", 2, folder=str(folder)):
        for name, found in rank.items():
            assert found["lapses"] == [], name
        assert rank["less"]["forwards"] == [2 * 2] * 3
        assert rank["plain"]["forwards"] == [2]
        assert rank["reference"]["forwards"] == [2 * 2] * 3


def test_a_resume_with_dropout_is_bit_identical(folder: Path) -> None:
    for rank in run_ranks("tests.engine.test_mode:resumed", 2, folder=str(folder)):
        assert rank["losses"][SAVE_AT:] == rank["tail"] and len(rank["tail"]) == 3 - SAVE_AT
        assert rank["hashes"][0] == rank["hashes"][1]
        assert rank["lapses"] == []
        assert abs(rank["losses"][0] - rank["without dropout"]) > 1e-4


def test_initialize_puts_the_model_in_train_mode(folder: Path) -> None:
    ((came, modes),) = run_ranks("tests.engine.test_mode:in_a_loop_of_ones_own", 1, folder=str(folder))
    assert came is False and modes == [True, True, False, True]
