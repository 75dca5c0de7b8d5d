"""The house rules that a script can read from the sources: imports, communication, sizes, safe loading.

Every rule is a function from a parsed file to the lines that break it, so that each is also tried on a
file that does break it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 300, 50

BASE = {"utils", "core"}
FORWARD = BASE | {"ops", "forward"}
SCORING = FORWARD | {"scoring"}
MIDDLE = SCORING | {"config", "data"}
COMPONENTS = {"train.selector", "train.mixer", "train.weighter"}
# What each room may import; itself always, and the package's own __init__ (its version).
MAY_IMPORT = {
    "utils": {"utils"},
    "core": BASE,
    "config": {"config", "utils"},
    "ops": {"ops", "utils"},
    "forward": FORWARD,
    "scoring": SCORING,
    "data": MIDDLE,
    "report": MIDDLE,
    "train.selector": MIDDLE,
    "train.mixer": MIDDLE,
    "train.weighter": MIDDLE,
    "train.decisions": MIDDLE | COMPONENTS | {"report"},
    "engine": MIDDLE | COMPONENTS,
    "train.trainer": MIDDLE | COMPONENTS | {"train.decisions", "engine", "report"},
    "driver": MIDDLE | COMPONENTS | {"engine", "train", "train.decisions", "train.trainer", "report"},
    "worker": {"utils"},
    "launcher": {"config", "core", "data", "report", "utils", "worker"},
    "cli": {"config", "utils", "launcher", "worker", "driver", "core", "ops", "report"},
    "demo": {"config", "utils", "cli"},
}
# These start without any of the heavy libraries; some modules load them inside the functions that need them.
LEAN = ("__init__", "cli", "launcher", "worker", "core", "config", "utils.errors", "utils.logging", "demo")
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "peft", "pandas", "pyarrow", "matplotlib"}
NUMPY_TOO = ("cli", "launcher", "worker", "config")
MAY_COMMUNICATE = ("utils.dist", "scoring.gather", "engine")
COMMUNICATION = ("torch.distributed", "deepspeed.comm")
MAKES_LOSSES = ("forward", "ops")
LOSSES = tuple(
    f"dataflex.ops.{n}"
    for n in ("per_sample_loss", "linear_per_sample_loss", "losses.loss", "losses.linear_sweep.sweep")
)
UNSAFE_CALLS = {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pickle.load", "pickle.loads"}


@dataclass(frozen=True)
class Source:
    """A parsed file of the package; ``module`` is dotted and leaves out ``dataflex.``."""

    module: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def within(self, *rooms: str) -> bool:
        return any(self.module == room or self.module.startswith(f"{room}.") for room in rooms)


def package_sources() -> list[Source]:
    sources = []
    for path in sorted((ROOT / "dataflex").rglob("*.py")):
        parts = path.relative_to(ROOT / "dataflex").with_suffix("").parts
        named = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        sources.append(Source(".".join(named), path.read_text(encoding="utf-8")))
    return sources


def room_of(module: str) -> str:
    """The room that a module lies in: ``train.selector`` for ``train.selector.base_selector``."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "train" else parts[0]


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported; ``from a import b`` is ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this package"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from on_import(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from on_import(getattr(node, field, []))


def calls(source: Source) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, full name, call) of every call whose name can be read, local names of imports resolved."""
    names: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            first, _, rest = ast.unparse(node.func).partition(".")
            yield node.lineno, names.get(first, first) + (f".{rest}" if rest else ""), node


def wrong_way_imports(source: Source) -> list[str]:
    room = room_of(source.module)
    if room in ("__init__", "train"):
        return []
    if room not in MAY_IMPORT:
        return [f"{source.module}: the room '{room}' is not in MAY_IMPORT"]
    found = []
    for line, name in imported(ast.walk(source.tree)):
        top, _, rest = name.partition(".")
        if top == "dataflex" and rest and room_of(rest) not in MAY_IMPORT[room] | {room, "__version__"}:
            found.append(f"{source.module}:{line} imports {name}")
    return found


def heavy_imports(source: Source) -> list[str]:
    if not source.within(*LEAN):
        return []
    heavy = HEAVY | ({"numpy"} if source.within(*NUMPY_TOO) else set())
    lines = imported(list(on_import(source.tree.body)))
    return [f"{source.module}:{line} imports {name}" for line, name in lines if name.split(".")[0] in heavy]


def stray_communication(source: Source) -> list[str]:
    if source.within(*MAY_COMMUNICATE):
        return []
    found = [(line, name) for line, name, _ in calls(source) if name.startswith(COMMUNICATION)]
    return [f"{source.module}:{line} calls {name}" for line, name in found]


def stray_losses(source: Source) -> list[str]:
    """Losses that are made past the one way from a batch to them."""
    if source.within(*MAKES_LOSSES):
        return []
    found = [(line, name) for line, name in imported(ast.walk(source.tree)) if name.startswith(LOSSES)]
    return [f"{source.module}:{line} imports {name}" for line, name in found]


def last_name(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def unsafe_loading(source: Source) -> list[str]:
    safe_loaders = {"SafeLoader", "CSafeLoader"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and {last_name(base) for base in node.bases} & safe_loaders:
            safe_loaders.add(node.name)
    found = []
    for line, name, call in calls(source):
        given = {keyword.arg: last_name(keyword.value) for keyword in call.keywords}
        loader = given.get("Loader") or "".join(map(last_name, call.args[1:2]))
        if (
            name in UNSAFE_CALLS
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "yaml.load" and loader not in safe_loaders)
            or (name == "numpy.load" and given.get("allow_pickle", "False") != "False")
        ):
            found.append(f"{source.module}:{line} calls {name} unsafely")
    return found


def oversized(source: Source) -> list[str]:
    lines = source.text.count("\n")
    found = [f"{source.module}: {lines} lines"] if lines > LONGEST_FILE else []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno
            if length > LONGEST_FUNCTION:
                found.append(f"{source.module}:{node.lineno} {node.name}: {length} lines")
    return found


def swallowed_errors(source: Source) -> list[str]:
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                found.append(f"{source.module}:{node.lineno} catches everything and goes on")
    return found


Rule = Callable[[Source], list[str]]
LONG_FUNCTION = "def f():\n" + "    pass\n" * 52
BROKEN: list[tuple[Rule, str, str]] = [
    (wrong_way_imports, "ops.loss", "def f():\n    from dataflex.scoring import gather\n"),
    (wrong_way_imports, "train.selector.base_selector", "import dataflex.engine.steps.loop\n"),
    (wrong_way_imports, "core.plan", "from dataflex import config\n"),
    (wrong_way_imports, "attic.old", "import os\n"),
    (heavy_imports, "config.load", "import numpy as np\n"),
    (heavy_imports, "core.hook", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass\n"),
    (stray_communication, "data.pool", "import torch.distributed as dist\ndist.all_reduce(x)\n"),
    (stray_communication, "driver", "def f():\n    from deepspeed.comm import barrier\n    barrier()\n"),
    (stray_communication, "scoring.taps", "import torch\ntorch.distributed.barrier()\n"),
    (stray_losses, "scoring.scorer", "from dataflex.ops import SampleLoss, per_sample_loss\n"),
    (stray_losses, "engine.reference", "def f():\n    from dataflex.ops.losses.loss_linear import linear_loss\n"),
    (unsafe_loading, "engine.checkpoint", "import torch\ntorch.load(path)\n"),
    (unsafe_loading, "engine.checkpoint", "from torch import load\nload(path, weights_only=False)\n"),
    (unsafe_loading, "config.load", "import yaml\nyaml.load(text, Loader=yaml.Loader)\n"),
    (unsafe_loading, "scoring.store", "import numpy as np\nnp.load(path, allow_pickle=True)\n"),
    (oversized, "data.pool", "x = 1\n" * 301),
    (oversized, "data.pool", LONG_FUNCTION),
    (swallowed_errors, "cli", "try:\n    f()\nexcept Exception:\n    pass\n"),
]
OWN_LOADER = "import yaml\nclass Mine(yaml.SafeLoader): ...\nyaml.load(text, Loader=Mine)\n"
VERSION = "from dataflex import __version__\nfrom dataflex.scoring import gather\n"
LAZY = "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
ALLOWED: list[tuple[Rule, str, str]] = [
    (wrong_way_imports, "engine.plugin", VERSION),
    (heavy_imports, "core.hook", LAZY),
    (stray_communication, "utils.dist", "import torch.distributed as dist\ndist.all_reduce(x)\n"),
    (stray_losses, "engine.loop", "from dataflex.ops import SampleLoss, shift_labels\n"),
    (unsafe_loading, "config.load", OWN_LOADER),
    (unsafe_loading, "engine.checkpoint", "import torch\ntorch.load(path, weights_only=True)\n"),
    (swallowed_errors, "cli", "try:\n    f()\nexcept Exception as e:\n    raise UserError('x') from e\n"),
]
RULES = sorted({rule for rule, _, _ in BROKEN}, key=lambda rule: rule.__name__)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    sources = package_sources()
    assert len(sources) > 20
    assert not [problem for source in sources for problem in rule(source)]


@pytest.mark.parametrize(("rule", "module", "text"), BROKEN)
def test_the_rule_sees(rule: Rule, module: str, text: str) -> None:
    assert rule(Source(module, text))


@pytest.mark.parametrize(("rule", "module", "text"), ALLOWED)
def test_the_rule_lets_pass(rule: Rule, module: str, text: str) -> None:
    assert not rule(Source(module, text))


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import sys, dataflex, dataflex.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split()
    assert "dataflex" in loaded
    assert not (HEAVY | {"numpy"}) & set(loaded)
