"""What can be tapped: the modules whose weight gradients the taps know how to rebuild."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dataflex.scoring.layers import LayerRule
from dataflex.utils.errors import UserError

_EXPERT_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class Target:
    """A module, how it is tapped, and the parameters asked for: {attribute: full name}.

    kind: linear (y = x W^T + b), conv1d (y = x W + b), embedding, norm (elementwise scale of a normalised input),
    called (a linear of its own making, such as a router: F.linear is called in its forward) or experts (fused
    [E, M, K] matrices).
    """

    module: nn.Module
    kind: str
    names: dict[str, str]


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


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, but for the insides of peft's ParamWrapper: they are no layers, their weights are multiplied."""
    if type(module).__name__ == "ParamWrapper":
        base = getattr(module, "base_layer", None)
        children = [] if base is None else [base]
    else:
        yield module
        children = list(module.children())
    for child in children:
        yield from _modules(child)


def parameter_names(targets: list[Target]) -> list[str]:
    """Names of the covered parameters, in the order of the modules; a tied one comes once per use."""
    return [name for t in targets for name in t.names.values()]


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
    for m in _modules(module):
        kind = kind_of(m)
        if kind is None or id(m) in seen:
            continue
        seen.add(id(m))
        own = dict(m.named_parameters(recurse=False, remove_duplicate=False))
        found = {a: name_of[id(own[a])] for a in _attributes(m, kind) if a in own and id(own[a]) in name_of}
        if found:
            targets.append(Target(m, kind, found))
            covered.update(found.values())
    missing = sorted(chosen - covered)
    if missing:
        raise UserError(
            f"gradient features: no tap covers the trained parameter{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; covered: Linear, Conv1D, Embedding, "
            "LayerNorm and RMSNorm, routers and fused experts; freeze them, or leave them out with `layers`"
        )
    return targets
