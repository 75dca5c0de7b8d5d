"""What hooks and components may look at while training runs: `Run`, and the small `Accelerator`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.core.clock import Clock
from dataflex.core.packing import Packing
from dataflex.core.plan import Schedule
from dataflex.utils.stopping import Stop

if TYPE_CHECKING:
    import torch


@dataclass
class Run:
    """One training run. ``step`` counts finished optimizer steps; ``loss`` is that of the last global batch.

    ``micro_batch`` is per rank; ``global_batch`` is micro-batch x GAS x world size, in rows: of a sample each, or with
    ``packing`` of several. ``figures``: what hooks have to say of the step in its line of the log, emptied before each
    step.
    ``stop``: whether it is to end before its last step.
    """

    schedule: Schedule
    seed: int
    micro_batch: int
    accumulation: int
    world_size: int
    rank: int
    output_dir: Path | None
    engine: Any
    pool: Any
    packing: Packing | None = None
    step: int = 0
    loss: float = float("nan")
    clock: Clock = field(default_factory=Clock)
    figures: dict[str, float] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def global_step(self) -> int:
        return self.step

    @property
    def state(self) -> Run:
        """So that ``ctx.state.global_step`` of a seed weighter works."""
        return self


class Accelerator:
    """The members of an accelerator that components use, over this run's process group."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def process_index(self) -> int:
        from dataflex.utils import dist

        return dist.rank()

    @property
    def num_processes(self) -> int:
        from dataflex.utils import dist

        return dist.world_size()

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        from dataflex.utils import dist

        dist.barrier()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' equal-shaped tensors along the first dimension."""
        from dataflex.utils import dist

        return dist.all_gather(tensor)

    def print(self, *args: Any) -> None:
        """Print on rank 0."""
        if self.is_main_process:
            print(*args, flush=True)
