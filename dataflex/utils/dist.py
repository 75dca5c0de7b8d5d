"""Collectives, all of them no-ops in a single process without a process group."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dataflex.utils.errors import UserError

T = TypeVar("T")
_TIMED_OUT = re.compile(r"[Tt]imed out|[Tt]imeout")
_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection was likely closed|ncclRemoteError")


def active() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def shut_down() -> None:
    """End the process group; a run does so last, whether it went well or not."""
    if active():
        dist.destroy_process_group()


def let_all_groups_wait(timeout_s: float) -> None:
    """Have the groups that are made from now on wait so long: DeepSpeed makes its own without saying how long."""
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    if distributed_c10d.default_pg_nccl_timeout is not None:
        distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s)


def connection_to_store(timeout_s: float) -> Any:
    """A connection of its own to the store that the ranks found each other by, for a thread: those that wait block."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout_s)
    client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore("dataflex", client)


def is_timeout(exc: BaseException) -> bool:
    """Whether ``exc`` says that other ranks did not come to a collective."""
    return _of_communication(exc) and _TIMED_OUT.search(str(exc)) is not None


def is_failure_of_others(exc: BaseException) -> bool:
    """Whether ``exc`` says that other ranks did not come to a collective, or are gone."""
    return is_timeout(exc) or (_of_communication(exc) and _LOST.search(str(exc)) is not None)


def _of_communication(exc: BaseException) -> bool:
    return isinstance(exc, dist.DistError) or (isinstance(exc, RuntimeError) and "/gloo/" in str(exc))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block on rank 0 while the others wait, then on the others (which then hit a cache).

    Where rank 0 fails, the others fail too instead of waiting or repeating the work: with its UserError, if it is one.
    """
    failure: Exception | None = None
    if not is_main() and (failure := broadcast_object(failure)) is not None:
        raise failure
    try:
        yield
    except BaseException as exc:
        if is_main():
            other = RuntimeError("rank 0 failed in a step that the other ranks wait for")
            broadcast_object(exc if isinstance(exc, UserError) else other)
        raise
    if is_main():
        broadcast_object(None)


def together(make: Callable[[], T]) -> T:
    """Call ``make`` on every rank; a UserError of one rank is raised on all of them."""
    value, failure = None, None
    try:
        value = make()
    except UserError as exc:
        failure = exc
    for error in gather_objects(failure):
        if error is not None:
            raise error
    return cast(T, value)


def broadcast_object(obj: T) -> T:
    """Return rank 0's ``obj`` on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: T) -> list[T]:
    """Return every rank's ``obj``, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [obj]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, obj)
    return out


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(value: int) -> int:
    """Return the largest of the ranks' integers. CPU integer in, CPU integer out."""
    return max(gather_objects(int(value)))


def all_gather_uneven(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's 1-D tensor of whatever length, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [tensor]
    sizes = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = torch.nn.functional.pad(tensor, (0, max(sizes) - len(tensor)))
    return [part[:size] for part, size in zip(all_gather(padded[None]), sizes, strict=True)]


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate equal-shaped tensors of all ranks along the first dimension, in the order of ranks."""
    if world_size() == 1:
        return tensor
    out = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(out, tensor.contiguous())
    return torch.cat(out)
