"""A checkpoint of n processes goes on on m: the same samples, order, decisions, weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.config import load_config
from dataflex.core.plan import rank_slices
from dataflex.engine.checkpoint import loading
from dataflex.engine.checkpoint.resharding import Piece, resharded, sharded_layout
from dataflex.engine.checkpoint.split import Split, check_split
from dataflex.engine.folder import run_folder
from dataflex.engine.folder.identity import bits_digest
from dataflex.engine.optimizer_state import read_moments
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks

STEPS, GLOBAL, ACCUMULATION = 8, 12, 2
CHAIN = [(2, 4), (3, 6), (1, STEPS)]
# What is trained, the ZeRO stage, and what holds of "bf16", "wide" (gradients in fp32 nevertheless), "optimizer" and
# "param" (they are offloaded).
FAST = [("lora", 3, ""), ("full", 3, "bf16 optimizer param")]
SLOW = [
    *(
        ("full", 3, ""),
        ("lora", 0, ""),
        ("full", 0, ""),
        ("lora", 1, ""),
        ("full", 1, ""),
        ("lora", 2, ""),
        ("full", 2, ""),
    ),
    *(("full", 0, "bf16"), ("lora", 1, "bf16"), ("full", 2, "bf16"), ("lora", 3, "bf16")),
    *(("full", 1, "bf16 wide"), ("lora", 1, "bf16 wide")),
    *(("full", 1, "optimizer"), ("lora", 2, "bf16 optimizer"), ("lora", 3, "optimizer"), ("full", 3, "param")),
]


def build(kind: str, stage: int, how: str) -> Any:
    """An engine that decides at steps 2 and 5, of two parameter groups, in small ZeRO-3 groups where it is full."""
    world, half = torch.distributed.get_world_size(), "bf16" in how
    config = tiny.ds_config(stage, micro_batch=GLOBAL // ACCUMULATION // world, accumulation=ACCUMULATION)
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": half}}
    if "wide" in how:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    offloaded = {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param") if what in how}
    config["zero_optimization"] |= offloaded | ({"sub_group_size": 3000} if kind == "full" else {})
    del config["optimizer"]
    net = tiny.model(kind, torch.bfloat16 if half else torch.float32, tiny.FEW_TARGETS, num_hidden_layers=1)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2], "lr": 3e-3}]
    return dataflex.initialize(
        model=net,
        optimizer=torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0),
        config=config,
        dataflex={
            "train_type": "dynamic_select",
            "component_name": "random",
            "warmup_step": 2,
            "update_step": 3,
            "update_times": 2,
        },
        train_dataset=tiny.samples(60, seed=9),
        tokenizer=tiny.PadZero(),
    )


def state(engine: Any) -> dict[str, Any]:
    """Every bit of the trained weights and of both moments; a collective."""
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    moments, constants = read_moments(engine, names)
    digests = [[bits_digest(moment) for moment in moments[name]] for name in names]
    return {"weights": tiny.parameter_hash(engine), "moments": digests, "step": constants.step}


def train(engine: Any, folder: Path, until: int) -> dict[str, Any]:
    """Train up to a step and save there; losses, global sample ids and the state at the end."""
    losses, ids = [], []
    for batch in engine.batches():
        losses.append(engine.training_step(batch))
        ids.append(batch.sample_ids.tolist())
        if engine.run.step == until:
            break
    engine.save_checkpoint(folder)
    return {
        "losses": losses,
        "ids": ids,
        "end": state(engine),
        "rates": [g["lr"] for g in engine.optimizer.param_groups],
    }


def named(model: Sequence[Any]) -> str:
    return " ".join(map(str, model)).rstrip()


def chain(folder: str, models: list[Any], link: int) -> dict[str, Any]:
    """Link ``link`` of `CHAIN`: load what the one before saved, train on."""
    results: dict[str, Any] = {}
    for model in models:
        home = Path(folder, named(model))
        engine = build(*model)
        loaded = None
        if link:
            engine.load_checkpoint(home)
            loaded = state(engine)
        found = {"loaded": loaded, **train(engine, home, CHAIN[link][1])}
        if link == 0:
            found["through"] = train(build(*model), Path(folder, f"{named(model)}-alone"), STEPS)
        results[named(model)] = found
    return results


def run_chain(folder: Path, models: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """Rank 0's results of every link."""
    target = "tests.engine.test_elastic:chain"
    return [
        run_ranks(target, world, folder=str(folder), models=models, link=link)[0]
        for link, (world, _) in enumerate(CHAIN)
    ]


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_chain(tmp_path_factory.mktemp("elastic"), FAST)


def check(links: list[dict[str, Any]], model: tuple[str, int, str]) -> None:
    """Against a run of two processes from end to end; in bf16 a loss is rounded to 3 digits, as are gradients."""
    parts = [link[named(model)] for link in links]
    through = parts[0]["through"]
    for before, after in zip(parts, parts[1:], strict=False):
        assert after["loaded"] == before["end"]
        assert after["rates"] == before["rates"] == [1e-3, 3e-3]
    assert parts[1]["loaded"]["step"] == CHAIN[0][1]
    assert [ids for part in parts for ids in part["ids"]] == through["ids"]
    losses = [loss for part in parts for loss in part["losses"]]
    assert len(losses) == STEPS and len(set(losses)) == STEPS
    np.testing.assert_allclose(losses, through["losses"], rtol=0, atol=2e-2 if "bf16" in model[2] else 1e-5)


@pytest.mark.parametrize("model", FAST, ids=named)
def test_two_then_three_then_one_process(model: tuple[str, int, str], links: Any) -> None:
    check(links, model)


@pytest.mark.slow
def test_two_then_three_then_one_process_at_every_stage(tmp_path: Path) -> None:
    links = run_chain(tmp_path, SLOW)
    for model in SLOW:
        check(links, model)


SAVED = {"micro_batch": 2, "gradient_accumulation": 4, "world_size": 2}
PLACE = Path("out/checkpoint-4")


def said(now: Split, compared: str = "") -> str | None:
    try:
        check_split({**SAVED, "compared": compared}, now, PLACE)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("now", [Split(2, 4, 2), Split(2, 8, 1), Split(4, 4, 1), Split(1, 4, 4), Split(16, 1, 1)])
def test_the_same_global_batch_may_be_split_anyhow(now: Split) -> None:
    assert said(now) is None


def test_another_global_batch_names_what_would_fit() -> None:
    assert said(Split(2, 4, 4)) == (
        "out/checkpoint-4: the checkpoint has a global batch of 2 x 4 x 2 = 16 samples (per_device_train_batch_size x "
        "gradient_accumulation_steps x processes), this run has 2 x 4 x 4 = 32; with --num_processes 4 set "
        "per_device_train_batch_size: 2 and gradient_accumulation_steps: 2, or go on with --num_processes 2, "
        "per_device_train_batch_size: 2 and gradient_accumulation_steps: 4"
    )


@pytest.mark.parametrize(
    ("now", "advised"), [(Split(8, 4, 1), (8, 2)), (Split(1, 4, 2), (2, 4)), (Split(3, 5, 1), (2, 8))]
)
def test_the_advised_micro_batch_is_as_large_as_any_that_was_run(now: Split, advised: tuple[int, int]) -> None:
    text = said(now)
    words = f"per_device_train_batch_size: {advised[0]} and gradient_accumulation_steps: {advised[1]}"
    assert text is not None and f"--num_processes {now.world_size} set {words}, or go on with" in text


def test_a_count_that_cannot_hold_the_global_batch_names_those_that_can() -> None:
    text = said(Split(2, 4, 3))
    assert text is not None and "; --num_processes 3 does not fit; valid: 1, 2, 4, 8, 16; or go on with" in text


def test_weights_that_compare_samples_keep_their_groups() -> None:
    """Of 2 x 2 samples: all processes' micro-batches together, or those of 2 where each process stands for itself."""
    whole, own = "global micro-batch", "micro-batch"
    assert said(Split(4, 4, 1), whole) is None
    assert said(Split(1, 4, 4), whole) is None
    assert said(Split(2, 2, 4), own) is None
    text = said(Split(2, 8, 1), whole)
    assert (
        text is not None
        and (
            "its weighting compares the samples of a global micro-batch, which has 4 samples in the checkpoint and 2 "
            "in this run; with --num_processes 1 set per_device_train_batch_size: 4 and gradient_accumulation_steps: "
            "4, or"
        )
        in text
    )
    text = said(Split(1, 2, 8), whole)
    assert text is not None and "--num_processes 8 does not fit; valid: 1, 2, 4; or go on" in text
    text = said(Split(4, 4, 1), own)
    assert text is not None and "set per_device_train_batch_size: 2 and gradient_accumulation_steps: 8, or" in text
    assert said(Split(4, 4, 1, own)) == text  # by this run's weighter as well


@pytest.mark.parametrize("value", [None, 0, True, "2", [2]])
@pytest.mark.parametrize("key", SAVED)
def test_damaged_numbers_are_told(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"out/checkpoint-4: the checkpoint has {key} .*, expected a whole number >= 1"):
        check_split({**SAVED, key: value}, Split(2, 4, 2), PLACE)


def test_the_pieces_of_sharded_parameters() -> None:
    """Seven and two values on three ranks: parts of three and of one, the last ones short or empty."""
    sizes = [{"a": 7, "b": 2}]
    assert [sharded_layout(sizes, rank, 3) for rank in range(3)] == [
        [[Piece("a", 0, 3, 0), Piece("b", 0, 1, 3)]],
        [[Piece("a", 3, 3, 0), Piece("b", 1, 1, 3)]],
        [[Piece("a", 6, 1, 0), Piece("b", 2, 0, 3)]],
    ]


def fake(values: int = 6, nvme: bool = False) -> Any:
    """As much of a ZeRO-3 engine of one process as cutting anew looks at; its one parameter has ``values``."""
    parameter = torch.nn.Parameter(torch.zeros(values))
    parameter.ds_numel = values
    flats = [torch.zeros(values)]
    optimizer = SimpleNamespace(
        fp16_groups=[[parameter]], fp32_partitioned_groups_flat=flats, sub_group_to_group_id={0: 0}
    )
    return SimpleNamespace(
        optimizer=optimizer,
        param_names={parameter: "w"},
        zero_optimization_stage=lambda: 3,
        zero_nvme_offload_optimizer=lambda: nvme,
    )


def saved_on_two(state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "fp32_flat_groups": [torch.arange(3.0) + 3 * rank],
            "optimizer_state_dict": {"state": {0: state}, "param_groups": [{"lr": 0.5, "params": [0]}]},
        }
        for rank in range(2)
    ]


MODEL = {"param_shapes": [{"w": torch.Size([2, 3])}]}


def test_two_parts_become_one() -> None:
    state = {"step": torch.tensor(7.0), "momentum": torch.tensor([1.0, 2.0, 3.0])}
    made = resharded(fake(), MODEL, saved_on_two(state), PLACE)
    assert made["fp32_flat_groups"][0].tolist() == [0, 1, 2, 3, 4, 5]
    inner = made["optimizer_state_dict"]
    assert inner["param_groups"] == [{"lr": 0.5, "params": [0]}]
    assert inner["state"][0]["momentum"].tolist() == [1, 2, 3, 1, 2, 3]
    assert inner["state"][0]["step"].item() == 7 and inner["state"][0]["step"] is not state["step"]


@pytest.mark.parametrize(
    ("engine", "state", "words"),
    [
        (fake(5), {}, "is of another model: it trains 6 values of w, this run 5"),
        (fake(nvme=True), {}, "an optimizer that is offloaded to NVMe resumes on as many processes as saved it"),
        (fake(), {"row": torch.zeros(2)}, "an optimizer whose row is not one number per weight resumes on as many"),
    ],
)
def test_what_cannot_be_cut_anew_is_told(engine: Any, state: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"out/checkpoint-4: {words}"):
        resharded(engine, MODEL, saved_on_two(state), PLACE)


@pytest.mark.parametrize("offload", [{"device": "nvme", "nvme_path": "/x"}, {"device": "cpu"}, "none", None])
def test_an_optimizer_on_nvme_is_told_before_data_and_model_are_read(
    offload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {**SAVED, "gradient_accumulation": 2, "compared": ""}
    monkeypatch.setattr(loading, "read_state", lambda folder: {"identity": identity})
    keys = {"model_name_or_path": "m", "dataset": "a", "dataset_dir": str(tmp_path), "output_dir": str(tmp_path)}
    keys |= {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}}
    cfg = load_config(keys | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, quiet=True)
    if isinstance(offload, dict) and "nvme_path" in offload:
        with pytest.raises(UserError, match="^out/checkpoint-4: an optimizer that is offloaded to NVMe resumes on as"):
            run_folder._fitting(cfg, PLACE)
    else:
        assert run_folder._fitting(cfg, PLACE) == PLACE


def test_the_global_order_is_the_same_for_every_number_of_ranks() -> None:
    """The samples of all ranks together in each micro-step, in the plan's order, where micro-batch x ranks is 6."""
    ids = np.arange(12)
    for world in (1, 2, 3, 6):
        parts = [rank_slices(ids, micro_batch=6 // world, rank=rank, world_size=world) for rank in range(world)]
        assert [np.concatenate(step).tolist() for step in zip(*parts, strict=True)] == [list(range(6)), [*range(6, 12)]]
