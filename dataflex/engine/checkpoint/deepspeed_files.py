"""DeepSpeed's own files: of a checkpoint of ours, and of a running job that knew nothing of dataflex."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dataflex.engine.checkpoint.manifest import POINTER, pointed_to
from dataflex.engine.checkpoint.resharding import resharded
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_plain(engine: Any, folder: Path, step: int, **how: Any) -> tuple[str, dict[str, Any]]:
    """DeepSpeed's ``load_checkpoint`` of a folder that `is_plain`, with its answer; a collective.

    step: steps of dataflex's own schedule that are done, for what is said.
    UserError for another world size or another kind of ZeRO stage, and where a file holds what needs code to load.
    """
    stage = engine.zero_optimization_stage()
    saved = dist.broadcast_object(_layout_of(folder))
    now = ("3" if stage == 3 else "1 or 2" if stage else "0", dist.world_size() if stage else None)
    same_weights = how.get("load_module_only", False) and "3" not in (saved[0], now[0])
    if saved != now and not same_weights:
        kinds = [f"ZeRO-{kind}" + (f" on {ranks} processes" if ranks else "") for kind, ranks in (saved, now)]
        raise UserError(f"{folder}: the checkpoint is of {kinds[0]}, this run has {kinds[1]}; both must be the same")
    answer = load_deepspeed(engine, folder, **how)
    logger.warning(
        f"{folder}: a checkpoint of DeepSpeed's own, after step {engine.global_steps}: weights, optimizer and learning "
        f"rate schedule go on from there; dataflex's schedule, plan and random state are left at their step {step}"
    )
    return answer


def load_deepspeed(engine: Any, folder: Path, strict: bool = True, **how: Any) -> tuple[str, dict[str, Any]]:
    """DeepSpeed's ``load_checkpoint`` of ``folder`` without running code that a file names; (path, client_state).

    strict: unless ``how`` says otherwise. ZeRO-3 has the weights in the optimizer's files alone: DeepSpeed reads them
    from there only when told not to load the optimizer, and then of the checkpoint that `POINTER` names.
    """
    how = {"load_module_strict": True, **how}
    how["load_module_strict"] = how["load_module_strict"] and strict
    only_weights = how.get("load_module_only", False) or not how.get("load_optimizer_states", True)
    if only_weights and engine.zero_optimization_stage() == 3:
        how["load_optimizer_states"] = False
        named = dist.broadcast_object(pointed_to(folder.parent))
        if named is None or named.name != folder.name:
            raise UserError(
                f"load_checkpoint: under ZeRO-3 DeepSpeed loads weights without the optimizer only from the checkpoint "
                f"that {folder.parent / POINTER} names, which is {named.name if named else 'nothing there'}, not "
                f"{folder.name}; load the optimizer states as well"
            )
    try:
        with _no_code(), _cut_for_the_processes(engine, folder):
            path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name, **how)
    except pickle.UnpicklingError as exc:
        words = " ".join(str(exc).split())
        raise UserError(
            f"{folder}: holds an object that only code can load, and no code of a checkpoint is run; name its class in "
            f"torch.serialization.add_safe_globals first: {words[words.find('Unsupported') :][:160]}"
        ) from exc
    except RuntimeError as exc:
        if "loading state_dict" not in str(exc):
            raise
        raise UserError(f"{folder}: is of another model: {' '.join(str(exc).split())[:300]}") from exc
    assert path is not None, f"DeepSpeed found no checkpoint in {folder}"
    return path, client_state


def _layout_of(folder: Path) -> tuple[str, int | None]:
    """(ZeRO stage, processes) that a checkpoint's file names tell; without ZeRO it is the same for any number."""
    whole = len(list(folder.glob("zero_pp_rank_*_model_states.pt")))
    parts = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    return ("3", whole) if whole else ("1 or 2", parts) if parts else ("0", None)


@contextmanager
def _cut_for_the_processes(engine: Any, folder: Path) -> Iterator[None]:
    """Inside, DeepSpeed finds a ZeRO checkpoint of any number of processes as one of as many as there are now."""
    stage, saved = engine.zero_optimization_stage(), _layout_of(folder)[1]
    if stage == 0 or dist.broadcast_object(saved) in (None, dist.world_size()):
        yield
        return
    reads, models = engine.checkpoint_engine, sorted(folder.glob("*mp_rank_00_model_states.pt"))
    engine.checkpoint_engine = _OtherProcesses(engine, folder)
    engine._get_all_ckpt_names = lambda *_: [str(models[0])]
    try:
        yield
    finally:
        engine.checkpoint_engine = reads
        del engine._get_all_ckpt_names


class _OtherProcesses:
    """Reads for DeepSpeed, in place of its checkpoint engine, a checkpoint of another number of processes."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.folder = engine, folder

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """The model states of the first rank, or the optimizer state of this rank."""
        if not path.endswith("optim_states.pt"):
            return {**_mapped(Path(path)), "dp_world_size": dist.world_size()}
        files = sorted(self.folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        optimizers = [_mapped(file)["optimizer_state_dict"] for file in files]
        model = _mapped(next(self.folder.glob("*mp_rank_00_model_states.pt")))
        return {"optimizer_state_dict": resharded(self.engine, model, optimizers, self.folder)}


def _mapped(file: Path) -> dict[str, Any]:
    """The content of a file of DeepSpeed's, read from the disk where it is used."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return content


def _rank_of(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    assert found is not None
    return int(found.group(1))


def deepspeed_globals() -> list[Any]:
    """The classes in DeepSpeed's files that loading without code must be told of."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


@contextmanager
def _no_code() -> Iterator[None]:
    """Inside, torch.load runs no code that a file names, also where DeepSpeed asks for it."""
    forced = os.environ.get(FORCE_SAFE)
    os.environ[FORCE_SAFE] = "1"
    try:
        with torch.serialization.safe_globals(deepspeed_globals()):
            yield
    finally:
        if forced is None:
            del os.environ[FORCE_SAFE]
        else:
            os.environ[FORCE_SAFE] = forced
