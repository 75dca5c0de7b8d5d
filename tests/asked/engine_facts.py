"""Facts on a built engine: what its model, optimizer, schedule, plan and weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dataflex.core.registry import REGISTRY
from tests.asked.table import Built


def parameters(b: Built) -> dict[str, torch.nn.Parameter]:
    return dict(b.engine.module.named_parameters())


def first_values(b: Built, ends: str, module: Any = None) -> list[float]:
    """The first four numbers of the parameter whose name ends so."""
    named = (module or b.engine.module).named_parameters()
    return next(p.detach().flatten()[:4].float().tolist() for name, p in named if name.endswith(ends))


def trained(b: Built) -> list[str]:
    return sorted(name for name, p in parameters(b).items() if p.requires_grad)


def of_groups(b: Built, key: str) -> dict[str, Any]:
    """{name of a parameter: ``key`` of its group of the optimizer}."""
    names = {id(p): name for name, p in parameters(b).items()}
    return {names[id(p)]: group[key] for group in b.engine.optimizer.param_groups for p in group["params"]}


def every(b: Built, key: str) -> Any:
    """``key`` of the optimizer's groups, which all have the same."""
    values = [group[key] for group in b.engine.optimizer.param_groups]
    assert all(value == values[0] for value in values)
    return list(values[0]) if isinstance(values[0], tuple) else values[0]


def rates(b: Built) -> list[float]:
    """The learning rate of each step to come, from the scheduler as DeepSpeed moves it; the steps are not taken."""
    scheduler, optimizer = b.engine.lr_scheduler, b.engine.optimizer
    state = scheduler.state_dict()
    before = [group["lr"] for group in optimizer.param_groups]
    getattr(optimizer, "optimizer", optimizer)._opt_called = True
    found = []
    for _ in range(b.engine.run.total_steps + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = rate
    return found


def plan(b: Built) -> np.ndarray:
    """The sample ids of the first phase, by global batch."""
    run = b.engine.run
    made = b.engine._loop
    if made.plan is None:
        made._make_plan()
    return made.plan.sample_ids.reshape(-1, run.global_batch)


def lengths_apart(b: Built) -> bool:
    """Whether the global batches' ranges of lengths lie beside one another, end to end."""
    lengths = b.engine.run.pool.lengths[plan(b)]
    ends = sorted(zip(lengths.min(1), lengths.max(1), strict=True))
    return all(one[1] <= other[0] for one, other in zip(ends, ends[1:], strict=False))


def rows_of_evaluation(b: Built) -> int:
    """The most samples in a forward of `evaluate`."""
    rows: list[int] = []
    hook = b.engine.module.register_forward_pre_hook(
        lambda _module, _args, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    b.engine.evaluate()
    hook.remove()
    return max(rows)


def phases(b: Built) -> list[tuple[int, bool]]:
    return [(phase.steps, phase.decides) for phase in b.engine.run.schedule.phases]


def planner(b: Built) -> Any:
    return b.engine.planner


def of_lora(b: Built, name: str) -> list[Any]:
    """What the adapted layers have as ``name``, each value once."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in b.engine.module.modules() if isinstance(m, LoraLayer)]
    return sorted({_LORA[name](layer) for layer in layers})


_LORA: dict[str, Callable[[Any], Any]] = {
    "rank": lambda layer: layer.lora_A["default"].weight.shape[0],
    "scaling": lambda layer: layer.scaling["default"],
    "dropout": lambda layer: getattr(layer.lora_dropout["default"], "p", 0.0),
    "B": lambda layer: float(layer.lora_B["default"].weight.float().mean()),
}


def rates_of_lora(b: Built) -> dict[str, list[float]]:
    """The learning rates of LoRA's A, of its B, and of what is trained whole."""
    found: dict[str, set[float]] = {"lora_A": set(), "lora_B": set(), "whole": set()}
    for name, rate in of_groups(b, "initial_lr").items():
        found[next((part for part in ("lora_A", "lora_B") if part in name), "whole")].add(rate)
    return {part: sorted(rates) for part, rates in found.items()}


def noise(b: Built) -> list[Any]:
    """Of the embeddings of four tokens: whether noise is on them in train mode, and within its bound; then in eval."""
    table = b.engine.module.get_input_embeddings()
    plain = table.weight.detach()[:4]
    bound = 6.0 / (4 * plain.shape[1]) ** 0.5
    with torch.random.fork_rng(devices=[]):
        size = float((table(torch.arange(4)[None])[0].detach() - plain).abs().max())
    table.eval()
    quiet = float((table(torch.arange(4)[None])[0].detach() - plain).abs().max())
    table.train()
    return [bound / 2 < size, size <= bound * (1 + 1e-6), quiet]


def adapted(b: Built) -> list[str]:
    return sorted({name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in parameters(b) if ".lora_A." in name})


def recomputes(b: Built) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in b.engine.module.modules())


def reentrant(b: Built) -> list[bool]:
    kept = {
        m._gradient_checkpointing_func for m in b.engine.module.modules() if hasattr(m, "_gradient_checkpointing_func")
    }
    return sorted({func.keywords["use_reentrant"] for func in kept})


def static(b: Built) -> Any:
    return b.engine._loop.source.weights


def ratio(b: Built, one: int, other: int) -> float:
    """How many times likelier sample ``one`` is drawn than ``other``."""
    return float(static(b).draw[one] / static(b).draw[other])


def own_part(b: Built) -> bool:
    return "asked_own" in REGISTRY.names("selector")
