"""The optimizer state of a ZeRO checkpoint, cut anew for another number of processes.

ZeRO keeps fp32 weights and moments as flat tensors, each rank a part of them. `Piece` says where a part of a parameter
lies in a rank's flat tensor; the pieces of all saved ranks are copied to where this rank has its own. The numbers are
those that were saved: nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataflex.utils import dist
from dataflex.utils.errors import UserError

_ONLY_SAME = "resumes on as many processes as saved it"
_FP32 = {3: "fp32_flat_groups", 2: "single_partition_of_fp32_groups", 1: "single_partition_of_fp32_groups"}
# The trained parameters of each flat tensor, and the flat fp32 tensors: of ZeRO-3, of 1 and 2, of 1 in bf16 with
# gradients in fp32.
_GROUPS = ("fp16_groups", "bit16_groups", "bf16_groups")
_FLATS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
_STATE = {3: "optimizer_state_dict", 2: "base_optimizer_state", 1: "base_optimizer_state"}


class Piece(NamedTuple):
    """``length`` values of a parameter from its ``start``, which lie ``at`` a place of a flat tensor."""

    name: str
    start: int
    length: int
    at: int


Layout = list[list[Piece]]


def sharded_layout(sizes: Sequence[Mapping[str, int]], rank: int, world_size: int) -> Layout:
    """Of ZeRO-3: each parameter is cut into ``world_size`` parts of one size, the last ones shorter or empty.

    sizes: of each flat tensor, {parameter: values} in order.
    """
    layout: Layout = []
    for group in sizes:
        pieces, at = [], 0
        for name, size in group.items():
            part = -(-size // world_size)
            start = min(rank * part, size)
            pieces.append(Piece(name, start, min(part, size - start), at))
            at += part
        layout.append(pieces)
    return layout


def saved_layouts(stage: int, model: dict[str, Any], optimizers: Sequence[dict[str, Any]]) -> list[Layout]:
    """Each saved rank's layout. model: a file of model states. optimizers: each rank's optimizer state."""
    if stage == 3:
        sizes = [{name: shape.numel() for name, shape in group.items()} for group in model["param_shapes"]]
        return [sharded_layout(sizes, rank, len(optimizers)) for rank in range(len(optimizers))]
    done: dict[str, int] = {}
    layouts = []
    for saved in optimizers:  # each parameter's values lie in the order of the ranks
        layout: Layout = []
        for group in saved["param_slice_mappings"]:
            layout.append([Piece(name, done.get(name, 0), part.numel, part.start) for name, part in group.items()])
            for piece in layout[-1]:
                done[piece.name] = piece.start + piece.length
        layouts.append(layout)
    return layouts


def own_layout(engine: Any) -> tuple[Layout, list[int]]:
    """Layout and sizes of this rank's flat tensors in a running engine."""
    names, flats = engine.param_names, [flat.numel() for flat in _of_optimizer(engine, _FLATS)]
    if engine.zero_optimization_stage() == 3:
        sizes = [{names[p]: p.ds_numel for p in group} for group in _of_optimizer(engine, _GROUPS)]
        return sharded_layout(sizes, dist.rank(), dist.world_size()), flats
    layout = []
    for group in _of_optimizer(engine, _GROUPS):
        mapped = [(names[p], p._hp_mapping) for p in group if p._hp_mapping is not None]
        layout.append(
            [
                Piece(name, m.lp_fragment_address.start, m.lp_fragment_address.numel, m.hp_fragment_address.start)
                for name, m in mapped
            ]
        )
    return layout, flats


def _of_optimizer(engine: Any, names: Sequence[str]) -> Any:
    """What DeepSpeed's optimizers call by one of ``names``."""
    return next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))


def refuse_nvme(folder: Path) -> None:
    """UserError: the swapped parts of such an optimizer lie in files of each process, not in the checkpoint."""
    raise UserError(f"{folder}: an optimizer that is offloaded to NVMe {_ONLY_SAME}")


def resharded(engine: Any, model: dict[str, Any], optimizers: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """This rank's optimizer state as DeepSpeed would have saved it on as many processes as there are now.

    model, optimizers: as for `saved_layouts`; the result has new tensors. UserError where the checkpoint is of another
    model, or of an optimizer whose state is not one number per weight.
    """
    if engine.zero_nvme_offload_optimizer():
        refuse_nvme(folder)
    stage = engine.zero_optimization_stage()
    fp32, moments = _FP32[stage], _STATE[stage]
    if not all(isinstance(saved.get(moments), dict) and fp32 in saved for saved in optimizers):
        raise UserError(f"{folder}: {type(engine.optimizer).__name__} {_ONLY_SAME}")
    layouts = saved_layouts(stage, model, optimizers)
    _check_sizes(layouts, engine, folder)
    cut = _Cut(layouts, *own_layout(engine))
    paddings = optimizers[0].get("group_paddings", [0] * len(optimizers[0][fp32]))
    sizes = [flat.numel() for flat in optimizers[0][fp32]]
    states = [saved[moments]["state"] for saved in optimizers]
    for index, of in states[0].items():
        for key, value in of.items():
            fits = ((sizes[index],), (sizes[index] + paddings[index],))  # weights are saved with padding or without
            if torch.is_tensor(value) and value.dim() > 0 and value.shape not in fits:
                raise UserError(f"{folder}: an optimizer whose {key} is not one number per weight {_ONLY_SAME}")
    state = {index: cut.state(index, states) for index in range(len(cut.own))}
    groups = [dict(group) for group in optimizers[0][moments]["param_groups"]]
    if stage == 3:
        places = engine.optimizer.sub_group_to_group_id
        for number, group in enumerate(groups):
            group["params"] = [index for index in state if places[index] == number]
    weights = [cut.filled(index, [dict(enumerate(saved[fp32])) for saved in optimizers]) for index in state]
    return {**optimizers[0], fp32: weights, moments: {"state": state, "param_groups": groups}}


def _check_sizes(saved: Sequence[Layout], engine: Any, folder: Path) -> None:
    """UserError unless checkpoint and run train the same parameters of the same sizes."""
    was: Counter[str] = Counter()
    for layout in saved:
        was.update({piece.name: piece.length for pieces in layout for piece in pieces})
    groups = _of_optimizer(engine, _GROUPS)
    now = {engine.param_names[p]: getattr(p, "ds_numel", p.numel()) for group in groups for p in group}
    if different := sorted(name for name in was.keys() | now.keys() if was[name] != now.get(name, 0)):
        name = different[0]
        raise UserError(
            f"{folder}: is of another model: it trains {was[name]:,} values of {name}, this run {now.get(name, 0):,}"
        )


class _Cut:
    """What goes where. own, sizes: of `own_layout`. sources: of each own flat tensor, a saved one of its group."""

    def __init__(self, saved: Sequence[Layout], own: Layout, sizes: Sequence[int]) -> None:
        self.own, self.sizes = own, sizes
        self.places: dict[str, list[tuple[int, int, Piece]]] = {}
        for rank, layout in enumerate(saved):
            for index, pieces in enumerate(layout):
                for piece in pieces:
                    self.places.setdefault(piece.name, []).append((rank, index, piece))
        self.sources = [self.places[pieces[0].name][0][1] if pieces else i for i, pieces in enumerate(own)]

    def state(self, index: int, states: Sequence[dict[int, dict[str, Any]]]) -> dict[str, Any]:
        """The optimizer's state of an own flat tensor; what is not per weight, as Adam's step, is copied."""
        found: dict[str, Any] = {}
        for key, value in states[0].get(self.sources[index], {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                found[key] = self.filled(
                    index, [{i: of[key] for i, of in rank.items() if key in of} for rank in states]
                )
            else:
                found[key] = value.clone() if torch.is_tensor(value) else value
        return found

    def filled(self, index: int, flats: Sequence[Mapping[int, Tensor]]) -> Tensor:
        """The own flat tensor ``index`` from each saved rank's {index: flat tensor}; padding is zero."""
        result = torch.zeros(self.sizes[index], dtype=flats[0][self.sources[index]].dtype)
        for name, start, length, at in self.own[index]:
            for rank, source, piece in self.places[name]:
                low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
                if low < high:
                    part = flats[rank][source].narrow(0, piece.at + low - piece.start, high - low)
                    result.narrow(0, at + low - start, high - low).copy_(part)
        return result
