"""Components written as the seeds' guide says run unchanged: by component_modules, in the package, as a plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dataflex
from dataflex.core.registry import REGISTRY
from dataflex.launcher import free_port
from dataflex.train.trainer.components import load_components
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.component_cases import Recorder
from tests.distributed import ROOT, run_ranks

SAMPLES = Path(__file__).parent / "samples"
FILES = {"selector": "own_selector", "mixer": "own_mixer", "weighter": "own_weighter"}
TYPES = {"selector": "dynamic_select", "mixer": "dynamic_mix", "weighter": "dynamic_weight"}
PARAMS = {"selector": {"stride": 2}, "mixer": {"seed": 3}, "weighter": {"strategy": "uniform"}}
SIZES = {"a": 20, "b": 30}
STEPS, GLOBAL = 4, 4
HOMES = {
    "own": "dataflex_components_",
    "absolute": "dataflex_components_",
    "module": "module_",
    "plugin": "plugin_",
}


def name_of(kind: str, prefix: str) -> str:
    return f"{prefix}_{TYPES[kind].removeprefix('dynamic_')}"


def write_components(path: Path, prefixes: list[str]) -> None:
    """The blocks that the guide has users add to components.yaml."""
    groups = {f"{k}s": {name_of(k, p): {"name": name_of(k, p), "params": PARAMS[k]} for p in prefixes} for k in FILES}
    path.write_text(yaml.safe_dump(groups))


def train(kind: str, name: str, components: str | None, modules: list[str]) -> dict[str, Any]:
    """Train STEPS steps with one component, two ranks or one; where its class is from, and what it did."""
    schedule = {"train_step": STEPS} if kind == "weighter" else {"update_step": 2, "update_times": 2}
    recorder = Recorder()
    engine = dataflex.initialize(
        model=tiny.model("full"),
        config=tiny.ds_config(0, micro_batch=GLOBAL // torch.distributed.get_world_size()),
        dataflex={
            "train_type": TYPES[kind] if name else "static",
            "component_name": name or None,
            "component_modules": modules,
            **({"components_cfg_file": components} if components else {}),
            **schedule,
        },
        train_dataset={d: tiny.samples(size, seed=size) for d, size in SIZES.items()},
        tokenizer=tiny.PadZero(),
        hooks=[recorder],
    )
    losses = [engine.training_step(batch) for batch in engine.batches()]
    domains = np.repeat([0, 1], list(SIZES.values()))
    return {
        "home": REGISTRY.get(kind, name).__module__,
        "losses": losses,
        "picks": [sorted(ids) for ids in recorder.phases],
        "counts": [np.bincount(domains[ids], minlength=2).tolist() for ids in recorder.phases],
    }


def train_all(prefixes: list[str], components: str, modules: list[str], path: str | None = None) -> dict[str, Any]:
    """Every kind under every prefix, and the packaged custom weighter for comparison."""
    if path is not None:
        sys.path.insert(0, path)
    results = {
        name_of(kind, prefix): train(kind, name_of(kind, prefix), components, modules)
        for prefix in prefixes
        for kind in FILES
    }
    return results | {"custom": train("weighter", "custom", None, [])}


def check(results: dict[str, Any], prefix: str, home: str) -> None:
    select, mix, weight = (results[name_of(kind, prefix)] for kind in FILES)
    for result in (select, mix, weight):
        assert home in result["home"]
        assert len(result["losses"]) == STEPS and np.isfinite(result["losses"]).all()
    assert select["picks"] == [list(range(0, 4 * GLOBAL, 2))] * 2
    draw = np.random.RandomState(PARAMS["mixer"]["seed"]).random_sample(2)
    for counts in mix["counts"]:
        assert np.abs(np.array(counts) - draw / draw.sum() * 2 * GLOBAL).max() < 1
    np.testing.assert_allclose(weight["losses"], results["custom"]["losses"], rtol=1e-6)


def test_files_with_relative_and_absolute_imports_a_module_and_an_entry_point(tmp_path: Path) -> None:
    modules = [str(SAMPLES / f"{file}.py") for file in FILES.values()]
    plugin = []
    for kind, file in FILES.items():
        text = (SAMPLES / f"{file}.py").read_text().replace("from .base_", f"from dataflex.train.{kind}.base_")
        for prefix in ("absolute", "module", "plugin"):
            target = tmp_path / f"{prefix}_{kind}.py"
            target.write_text(text.replace('"own_', f'"{prefix}_'))
        modules += [str(tmp_path / f"absolute_{kind}.py"), f"module_{kind}"]
        plugin.append(f"{kind} = plugin_{kind}\n")
    package = tmp_path / "plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[dataflex.components]\n" + "".join(plugin))
    prefixes = list(HOMES)
    write_components(tmp_path / "own.yaml", prefixes)
    ranks = run_ranks(
        "tests.train.test_own_components:train_all",
        2,
        prefixes=prefixes,
        components=str(tmp_path / "own.yaml"),
        modules=modules,
        path=str(tmp_path),
    )
    for results in ranks:
        for prefix, home in HOMES.items():
            check(results, prefix, home)


ON_A_COPY = """
import json, sys
import deepspeed
import tests.warmed  # so that no operation of its own is built for shared memory
from tests.train.test_own_components import train_all
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
print(json.dumps(train_all(["own"], sys.argv[1], [])))
"""


def test_files_in_the_package_and_a_line_in_its_init(tmp_path: Path) -> None:
    """On a copy of the package, as someone who edits a clone of the repository does it."""
    for folder in ("dataflex", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for kind, file in FILES.items():
        room = tmp_path / "dataflex" / "train" / kind
        shutil.copy(SAMPLES / f"{file}.py", room)
        with (room / "__init__.py").open("a") as handle:
            handle.write(f"from .{file} import *\n")
    write_components(tmp_path / "own.yaml", ["own"])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_COPY, str(tmp_path / "own.yaml")],
        cwd=tmp_path,
        env=os.environ | alone | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout.splitlines()[-1]), "own", "dataflex.train.")


def component_file(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text)
    return str(folder / "mine.py")


SELECTOR = """
from dataflex.core.registry import register_selector
from .base_selector import Selector
from .helper import WHO

@register_selector("{name}")
class Mine(Selector):
    who = WHO
    def select(self, model, step_id, num_samples, **kwargs):
        return []
"""


def test_files_of_one_name_in_two_folders_are_two_modules_with_their_own_neighbours(tmp_path: Path) -> None:
    from dataflex.train.selector.base_selector import Selector

    paths = []
    for who in ("first", "second"):
        paths.append(component_file(tmp_path / who, SELECTOR.format(name=f"{who}_of_two")))
        (tmp_path / who / "helper.py").write_text(f"WHO = '{who}'\n")
    load_components(paths)
    load_components(paths)
    for who in ("first", "second"):
        cls = REGISTRY.get("selector", f"{who}_of_two")
        assert cls.who == who and issubclass(cls, Selector)


def test_two_own_components_of_one_name_clash(tmp_path: Path) -> None:
    text = SELECTOR.format(name="twice_named").replace("from .helper import WHO", "WHO = 0")
    paths = [component_file(tmp_path / who, text) for who in ("one", "two")]
    with pytest.raises(UserError, match="selector 'twice_named' is already registered by dataflex_components_"):
        load_components(paths)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("no_such_package.mine", "component_modules: cannot import 'no_such_package.mine': No module named"),
        ("/nowhere/mine.py", "component_modules: no file '/nowhere/mine.py'"),
    ],
)
def test_what_cannot_be_imported_is_named(module: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        load_components([module])
