"""What can be said of a run before its workers are started, which takes them seconds."""

from __future__ import annotations

from pathlib import Path

from dataflex.config import Config
from dataflex.config.components import KIND_NAMES, component_params, has_own_components
from dataflex.config.rules.commands import ONLY_LOOK
from dataflex.config.trackers import check_installed
from dataflex.core.registry import NAMED, RUNTIME, check_name, check_params
from dataflex.core.signatures import packaged
from dataflex.data.encoding.formats import find_format
from dataflex.data.sources.info import find_dataset_dir, read_dataset_infos
from dataflex.launcher.request import Request
from dataflex.report.plot import check_plotting
from dataflex.utils.errors import UserError, cut, nearest
from dataflex.utils.files import names_in


def check_ahead(cfg: Config, request: Request, command: str = "train") -> None:
    """UserError, a line for each template, dataset, checkpoint and package (of a tracker, of plots) that is missing.

    And for each of the package's components with a param that it does not take. Nothing is looked for where workers
    run on other machines, which may have what this one lacks.
    """
    if request.uses_ssh:
        return
    lines = []
    checks = (_template, _datasets, _checkpoint, check_installed, _plot)
    for check in checks if command in ONLY_LOOK else (*checks, _components):
        try:
            check(cfg)
        except UserError as error:
            lines.append(str(error))
    if lines:
        raise UserError("\n".join(lines))


def _template(cfg: Config) -> None:
    if cfg.data.template is not None:
        find_format(cfg.data.template)


def _components(cfg: Config) -> None:
    """Those of the user's own are known only once their code has run."""
    flex, lines = cfg.flex, []
    for kind in flex.kinds if not has_own_components(flex) else ():
        if flex.component(kind) is None or (kind == "mix" and flex.mixes_fixed):
            continue
        name, params = component_params(flex, kind)
        known = packaged(KIND_NAMES[kind])
        try:
            check_name(KIND_NAMES[kind], name, sorted(known))
            own = [p for p in known[name] if p.kind in NAMED]  # the base classes refuse what is left to them
            check_params(KIND_NAMES[kind], name, own, params, RUNTIME)
        except UserError as error:
            lines.append(str(error))
    if lines:
        raise UserError("\n".join(lines))


def _datasets(cfg: Config) -> None:
    asked = {
        "dataset": cfg.data.dataset,
        "eval_dataset": cfg.data.eval_dataset,
        "mixer_eval_dataset": cfg.flex.mixer_eval_dataset,
    }
    for key, names in asked.items():
        if names:
            read_dataset_infos(names, find_dataset_dir(cfg.data.dataset_dir, cfg.source), key)


def _checkpoint(cfg: Config) -> None:
    named = cfg.output.resume_path
    if named is not None and not Path(named).expanduser().exists():
        folder = Path(named).expanduser()
        raise UserError(
            f"resume_from_checkpoint: there is no folder '{cut(named)}'{nearest(folder.name, names_in(folder.parent))}"
        )


def _plot(cfg: Config) -> None:
    if cfg.output.plot_loss:
        check_plotting()
