"""`dataflex-cli doremi`: the three runs of DoReMi (arXiv 2305.10429) one after the other, in one launch."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.yaml_reader import read_mapping
from dataflex.data.chosen import with_chosen_data
from dataflex.driver.setup import with_components
from dataflex.driver.training import train
from dataflex.engine.folder import run_folder
from dataflex.engine.folder.start_over import changed, said_change
from dataflex.utils import dist
from dataflex.utils.errors import UserError, listed
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, read_record
from dataflex.utils.stopping import Stopped

RESULT = "doremi_average_weights.json"


@with_config(ConfigDict(extra="allow"))
class MeanWeights(TypedDict):
    """The result of a proxy run as far as it is read again."""

    domain_names: list[str]
    average_weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]]


def three_runs(cfg: Config) -> None:
    """Reference, proxy and final run, each in a folder of its own under output_dir; finished ones are not repeated.

    ``cfg`` describes the proxy run (dynamic_mix by doremi). Reference and proxy start from
    proxy_model_name_or_path and take proxy_train_step steps, where these are given; the final run starts from
    model_name_or_path and is sampled by the proxy's mean weights. A collective.
    """
    check(cfg)
    cfg, folder = with_chosen_data(cfg), Path(cfg.output.output_dir)
    _stage("reference", reference_run(cfg))
    _stage("proxy", proxy_run(cfg))
    weights = read_weights(folder / "proxy", cfg.data.dataset)
    shown = ", ".join(f"{name} {value:.1%}" for name, value in zip(cfg.data.dataset, weights, strict=True))
    logger.info(f"doremi: the final run mixes {shown}")
    _stage("final", final_run(cfg, weights))


def check(cfg: Config) -> None:
    """UserError for a config that does not describe a doremi run."""
    if cfg.flex.train_type != ("dynamic_mix",) or cfg.flex.mixes_fixed:
        raise UserError("train_type: dataflex-cli doremi needs dynamic_mix, without static_mix")
    name, params = component_params(cfg.flex, "mix")
    if name != "doremi":
        raise UserError(f"component_name: dataflex-cli doremi needs the mixer doremi, got '{name}'")
    if cfg.flex.reference_model_path or params.get("reference_model_path"):
        raise UserError(
            "reference_model_path: dataflex-cli doremi trains the reference itself; drop the key, or run the proxy "
            "alone with dataflex-cli train"
        )


def reference_run(cfg: Config) -> Config:
    """Step 1: a small model on the initial proportions."""
    return _run(_small(cfg), "reference", static_mix=True, component_name=None)


def proxy_run(cfg: Config) -> Config:
    """Step 2: the same small model, weighed by its losses in excess of the reference's."""
    return _run(_small(cfg), "proxy", reference_model_path=str(Path(cfg.output.output_dir) / "reference"))


def final_run(cfg: Config, weights: list[float]) -> Config:
    """Step 3: the model that is wanted, on the proportions that were found."""
    return _run(cfg, "final", static_mix=True, component_name=None, init_mixture_proportions=tuple(weights))


def read_weights(folder: Path, names: tuple[str, ...]) -> list[float]:
    """The mean weights that a proxy run found, in the order of ``names``; the same on every rank."""
    return dist.broadcast_object(dist.together(lambda: _read_weights(folder, names)))


def _read_weights(folder: Path, names: tuple[str, ...]) -> list[float]:
    try:
        found: MeanWeights = read_record(folder / RESULT, MeanWeights)
    except DamagedError as error:
        raise UserError(f"{folder}: {error}; remove {folder} to make the proxy run again") from None
    by_name = dict(zip(found["domain_names"], found["average_weights"], strict=False))
    if set(by_name) != set(names) or len(found["average_weights"]) != len(names) or not sum(by_name.values()) > 0:
        raise UserError(f"{folder / RESULT}: expected a weight for each of {listed(names)}, got {listed(by_name)}")
    return [by_name[name] for name in names]


def _small(cfg: Config) -> Config:
    model, flex = cfg.model, cfg.flex
    if flex.proxy_model_name_or_path:
        model = model.model_copy(update={"model_name_or_path": flex.proxy_model_name_or_path, "model_revision": "main"})
    if flex.proxy_train_step:
        flex = flex.model_copy(update={"train_step": flex.proxy_train_step})
    return cfg.model_copy(update={"model": model, "flex": flex})


def _run(cfg: Config, name: str, **flex: Any) -> Config:
    """``cfg`` in its own folder, with other keys of the mixing section."""
    output = cfg.output.model_copy(update={"output_dir": str(Path(cfg.output.output_dir) / name)})
    own = {"proxy_model_name_or_path": None, "proxy_train_step": None, **flex}
    return cfg.model_copy(update={"output": output, "flex": cfg.flex.model_copy(update=own)})


def _stage(name: str, cfg: Config) -> None:
    cfg, folder = with_components(cfg), Path(cfg.output.output_dir)
    if not cfg.output.overwrite_output_dir and dist.together(lambda: _finished(folder, cfg)):
        logger.info(f"doremi: the {name} run in {folder} is complete, nothing to do")
        return
    logger.info(f"doremi: {name} run in {folder}")
    stop = train(cfg)
    asked = dist.gather_objects(stop.reason if stop is not None and stop.asked else None)
    reason = next(filter(None, asked), None)
    if reason is not None and name != "final":
        raise Stopped(f"stopped after the {name} run ({reason}); the same command goes on with the next one")
    gc.collect()  # an engine holds itself in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dist.barrier()


def _finished(folder: Path, cfg: Config) -> bool:
    """Whether ``folder`` holds this finished run; UserError where it holds another."""
    if not (folder / run_folder.RESULTS).exists():
        return False
    before = read_mapping(folder / "config.yaml", "finished run's config")
    different = changed(before, cfg)
    if different:
        raise UserError(
            f"output_dir: {folder} holds a finished run with another {said_change(different[0], before, cfg)}; name "
            "another folder, or start over with overwrite_output_dir: true"
        )
    return True
