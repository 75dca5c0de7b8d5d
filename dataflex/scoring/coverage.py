"""What can be tapped: the modules whose weight gradients the taps know how to rebuild."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dataflex.scoring.layers import LayerRule
from dataflex.utils.errors import UserError

_EXPERT_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class Adapter:
    """LoRA factors that peft adds to a matrix or to fused experts: W_e + scaling * B_e A_e (peft's ParamWrapper).

    a: [E * r, in], experts one below the other; b: [out, r * E], column k * E + e. names: {"a", "b": full name} of
    those asked for.
    """

    a: Tensor
    b: Tensor
    scaling: float
    names: dict[str, str]


@dataclass(frozen=True)
class Target:
    """A module, how it is tapped, and the parameters asked for: {attribute: full name}.

    adapters: by the attribute that they change.
    kind: linear (y = x W^T + b), conv1d (y = x W + b), embedding, norm (elementwise scale of a normalised input),
    called (a linear of its own making, such as a router: F.linear is called in its forward) or experts (fused
    [E, M, K] matrices).
    """

    module: nn.Module
    kind: str
    names: dict[str, str]
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def groups(self) -> list[dict[str, str]]:
        """The names of its own parameters, and those of each adapter."""
        return [self.names, *(adapter.names for adapter in self.adapters.values())]


def kind_of(module: nn.Module) -> str | None:
    """How ``module``'s own parameters are tapped (`Target`), or None."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "linear"
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain else None
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
        return "norm"
    if all(hasattr(module, flag) for flag in _EXPERT_FLAGS):
        return None if getattr(module, "_is_expert_parallel", False) else "experts"
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is not None and len(getattr(weight, "ds_shape", weight.shape)) == 2 and set(own) <= {"weight", "bias"}:
        return "called"
    return None


def _attributes(module: nn.Module, kind: str) -> tuple[str, ...]:
    """The parameters that a module of ``kind`` may have."""
    if kind != "experts":
        return ("weight", "bias")
    if getattr(module, "has_post_expert_norm", False):
        return ()
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return (up, f"{up}_bias", "down_proj", "down_proj_bias")


def _modules(module: nn.Module, wrappers: tuple[Any, ...] = ()) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """All modules, each with the ParamWrappers of peft around it, whose own insides are never called."""
    if type(module).__name__ == "ParamWrapper":
        base: Any = module.base_layer
        yield from _modules(base, (*wrappers, module))
        return
    yield module, wrappers
    for child in module.children():
        yield from _modules(child)


def _adapters(kind: str, wrappers: tuple[Any, ...], name_of: dict[int, str]) -> dict[str, Adapter]:
    """Those that `Taps` can tap: one for each attribute, of a router's weight or of experts."""
    found: dict[str, Adapter] = {}
    for wrapper in wrappers:
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if len(active) != 1 or wrapper.merged or kind not in ("called", "experts"):
            continue
        a, b = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight
        names = {key: name_of[id(p)] for key, p in (("a", a), ("b", b)) if id(p) in name_of}
        if names:
            found[wrapper.parameter_name] = Adapter(a, b, float(wrapper.scaling[active[0]]), names)
    return found


def parameter_names(targets: list[Target]) -> list[str]:
    """Names of the covered parameters, in the order of the modules; a tied one comes once per use."""
    return [name for target in targets for names in target.groups() for name in names.values()]


def trained_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are trained; call it outside `scoring_mode`."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def find_targets(module: nn.Module, rule: LayerRule | None = None) -> list[Target]:
    """Every module with a trained parameter that ``rule`` chooses.

    UserError naming the chosen parameters that no tap covers.
    """
    names = trained_names(module)
    if not names:
        raise UserError("gradient features: the model has no trained parameter")
    chosen = set(names if rule is None else rule.factors(names))
    name_of = {id(p): n for n, p in module.named_parameters() if n in chosen}
    targets: list[Target] = []
    covered: set[str] = set()
    seen: set[int] = set()
    for m, wrappers in _modules(module):
        kind = kind_of(m)
        if kind is None or id(m) in seen:
            continue
        seen.add(id(m))
        own = dict(m.named_parameters(recurse=False, remove_duplicate=False))
        found = {a: name_of[id(own[a])] for a in _attributes(m, kind) if a in own and id(own[a]) in name_of}
        adapters = _adapters(kind, wrappers, name_of)
        if found or adapters:
            targets.append(Target(m, kind, found, adapters))
            covered.update(parameter_names(targets[-1:]))
    missing = sorted(chosen - covered)
    if missing:
        raise UserError(
            f"gradient features: no tap covers the trained parameter{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; covered: Linear, Conv1D, Embedding, "
            "LayerNorm and RMSNorm, routers and fused experts; freeze them, or leave them out with `layers`"
        )
    return targets
