"""What the ranks of `tests.distributed` run for the tests of the driver: many short runs in one process group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from dataflex.config import load_config
from dataflex.core.run_files import written
from dataflex.driver import training
from dataflex.engine.plugin import DataflexEngine
from dataflex.report.trainer_log import read_log
from dataflex.utils import dist
from dataflex.utils.errors import UserError

IDS = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))


def sweep(folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each case (flat YAML keys) after the other; what came of it, by name.

    ``damage`` in a case names a file that first loses its last byte, ``remove`` one that is first removed, ``like`` a
    config.yaml whose keys it has besides its own, ``strip`` a checkpoint that is first copied to
    ``resume_from_checkpoint`` without dataflex's files.
    """
    return {name: _run(Path(folder), name, keys) for name, keys in cases.items()}


class Killed(BaseException):
    """Ends a run where it stands: nothing of the package may catch it."""


def killed_at(folder: str, cases: dict[str, dict[str, Any]], steps: list[int]) -> dict[str, Any]:
    """`sweep` over each case as it is, in <case>/whole/run, and in <case>/killed/run, ended in each of ``steps``."""
    found: dict[str, Any] = {}
    step = DataflexEngine.training_step
    for name, keys in cases.items():
        for dying in steps:

            def mortal(self: Any, batch: Any, dying: int = dying) -> float:
                if self.run.step == dying:
                    raise Killed
                return step(self, batch)

            DataflexEngine.training_step = mortal  # type: ignore[method-assign]
            try:
                _run(Path(folder), name, keys | {"output_dir": f"{folder}/{name}/killed/run"})
            except Killed:
                found.setdefault(name, []).append(dying)
            finally:
                DataflexEngine.training_step = step  # type: ignore[method-assign]
        for kind in ("killed", "whole"):
            _run(Path(folder), name, keys | {"output_dir": f"{folder}/{name}/{kind}/run"})
    return found


def _run(folder: Path, name: str, keys: dict[str, Any]) -> dict[str, Any]:
    damaged, removed = keys.pop("damage", None), keys.pop("remove", None)
    if damaged is not None and dist.is_main():
        Path(damaged).write_bytes(Path(damaged).read_bytes()[:-1])
    stripped = keys.pop("strip", None)
    if stripped is not None and dist.is_main():
        shutil.copytree(stripped, keys["resume_from_checkpoint"], ignore=shutil.ignore_patterns("*dataflex_*"))
    if removed is not None and dist.is_main():
        Path(removed).unlink()
    if "like" in keys:
        keys = yaml.safe_load(Path(keys.pop("like")).read_text()) | keys
    path = folder / f"{name.replace(' ', '_')}_{dist.rank()}.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "runs" / name.replace(" ", "_")), **keys}))
    logits: list[torch.Tensor] = []
    finish = training._finish

    def note_logits(inputs: Any, engine: Any, *rest: Any) -> None:
        with torch.no_grad():
            engine.module.eval()
            logits.append(engine.module(input_ids=IDS).logits.float())
            engine.module.train()
        finish(inputs, engine, *rest)

    training._finish = note_logits
    try:
        cfg = load_config(path, quiet=True)
        training.train(cfg)
    except UserError as exc:
        return {"error": str(exc)}
    finally:
        training._finish = finish
        dist.barrier()
    return _result(cfg, logits) if dist.is_main() else {}


def _result(cfg: Any, logits: list[torch.Tensor]) -> dict[str, Any]:
    folder = Path(cfg.output.output_dir)
    history = read_log(folder)
    names = {path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()}
    files = {"/".join(parts[: 2 if parts[0] == "decisions" else 1]) for parts in names}
    return {
        "listed": sorted(name for _, names in written(folder) for name in names),
        "written": sorted(name for name in files if not name.startswith(".")),
        "losses": [e["loss"] for e in history if "loss" in e],
        "evals": [[e["current_steps"], e["eval_loss"]] for e in history if "eval_loss" in e],
        "files": sorted(p.name for p in folder.iterdir()),
        "results": json.loads((folder / "all_results.json").read_text()),
        "gap": _gap(cfg, logits[0]) if logits else None,
        "params": yaml.safe_load((folder / "config.yaml").read_text()).get("component_params"),
        "trained": bool(logits),
    }


def _gap(cfg: Any, logits: torch.Tensor) -> float:
    """Largest difference between the engine's logits and those of the exported model, loaded as a user would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(cfg.output.output_dir))
    if cfg.method.finetuning_type == "lora":
        dtype = torch.bfloat16 if cfg.train.bf16 else torch.float32
        base = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path, dtype=dtype)
        if tokens > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(tokens)
        model = PeftModel.from_pretrained(base, cfg.output.output_dir, autocast_adapter_dtype=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(cfg.output.output_dir)
    with torch.no_grad():
        return float((model.eval()(input_ids=IDS).logits.float() - logits).abs().max())
