"""What can be tapped: the modules whose weight gradients the taps know how to rebuild."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from dataflex.forward.head import is_plain_linear
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.gradients.norms import is_norm
from dataflex.utils.errors import UserError

# Reading these of a weight is no use of it.
_LOOKS = r"(?!\.(?:dtype|device|shape|data|size|is_meta|_\w+)\b)"
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
    called (a linear of its own making, such as a router: F.linear is called in its forward), looked_up (an embedding
    of its own making: F.embedding is), experts (fused [E, M, K] matrices) or rerun (anything else: `scoring.rerun`;
    the attributes are paths to the parameters inside).
    """

    module: nn.Module
    kind: str
    names: dict[str, str]
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def groups(self) -> list[dict[str, str]]:
        """The names of its own parameters, and those of each adapter."""
        return [self.names, *(adapter.names for adapter in self.adapters.values())]


def reads_parameter(kind: type, child: str, names: str = "weight") -> bool:
    """Whether the source of a class uses a parameter of its layer ``self.<child>``, so that the layer is not called.

    names: a regular expression of the parameters' names.
    """
    found = re.search(rf"\bself\.{re.escape(child)}\.(?:{names})\b{_LOOKS}", _source(kind))
    return found is not None


@cache
def _source(kind: Any) -> str:
    """The source of a class; empty where there is none to read."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def kind_of(module: nn.Module) -> str | None:
    """How ``module``'s own parameters are tapped (`Target`), or None."""
    if is_plain_linear(module):
        return "conv1d" if type(module).__name__ == "Conv1D" else "linear"
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if plain else "looked_up"
    own = dict(module.named_parameters(recurse=False))
    sizes = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in own.items()}
    if own and is_norm(module):
        return "norm"
    if all(hasattr(module, flag) for flag in _EXPERT_FLAGS):
        return None if getattr(module, "_is_expert_parallel", False) else "experts"
    if sizes.get("weight") == 2 and set(own) <= {"weight", "bias"} and _calls_linear(module):
        return "called"
    return None


def _calls_linear(module: nn.Module) -> bool:
    """Whether the module's forward hands its weight to F.linear."""
    kind: Any = type(module)
    source = _source(kind)
    handed = re.search(r"linear\([^()]*(?:\([^()]*\)[^()]*)*self\.weight", source) is not None
    return handed or (isinstance(module, nn.Linear) and (not source or "super().forward" in source))


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
    read = _read_by_their_parents(module)
    for m, wrappers in _modules(module):
        kind = None if id(m) in read else kind_of(m)
        kind = "called" if wrappers and kind == "linear" else kind
        if kind is None or id(m) in seen:
            continue
        seen.add(id(m))
        own = dict(m.named_parameters(recurse=False, remove_duplicate=False))
        found = {a: name_of[id(own[a])] for a in _attributes(m, kind) if a in own and id(own[a]) in name_of}
        adapters = _adapters(kind, wrappers, name_of)
        if found or adapters:
            targets.append(Target(m, kind, found, adapters))
            covered.update(parameter_names(targets[-1:]))
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found_again = _reruns(module, {name_of[i] for i in name_of if uses[i] == 1} - covered)
    targets += found_again
    missing = sorted(chosen - covered - set(parameter_names(found_again)))
    if missing:
        raise UserError(
            f"gradient features: no tap covers the trained parameter{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; covered are the parameters of every layer "
            "below the embeddings' own module; freeze these, or leave them out with `layers`"
        )
    return targets


def _read_by_their_parents(module: nn.Module) -> set[int]:
    """Ids of the layers that the module around them does not call but reads the parameters of."""
    return {
        id(child)
        for m in module.modules()
        for name, child in m.named_children()
        if reads_parameter(type(m), name, "weight|bias") and not _embeds(m)
    }


def _embeds(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Embedding) for inner in module.modules())


def _reruns(module: nn.Module, left: set[str]) -> list[Target]:
    """The outermost modules that own, or read, the parameters ``left``; none that has an embedding inside."""
    roots: dict[str, nn.Module] = {}
    for path, m in module.named_modules():
        if any(path == root or path.startswith(f"{root}.") for root in roots):
            continue
        own = [name for name, _ in m.named_parameters(recurse=False, remove_duplicate=False)]
        for child, inner in m.named_children():
            for name, p in inner.named_parameters(recurse=False):
                if not _sees_samples(inner, p) or reads_parameter(type(m), child, re.escape(name)):
                    own.append(f"{child}.{name}")
        if left & {f"{path}.{name}".lstrip(".") for name in own} and not _embeds(m):
            roots[path] = m
    targets = []
    for path, m in roots.items():
        names = {name: f"{path}.{name}" for name, _ in m.named_parameters() if f"{path}.{name}" in left}
        targets.append(Target(m, "rerun", names))
    return targets


def _sees_samples(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether what comes out of a module with this parameter is in the order of the batch's samples.

    Not of a list of parameters, which has no forward, nor of stacked experts, whose tokens are in an order of theirs.
    """
    stacked = len(getattr(parameter, "ds_shape", parameter.shape)) > 2 and not isinstance(module, nn.Conv1d)
    return type(module).forward is not nn.Module.forward and not stacked
