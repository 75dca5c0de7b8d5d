"""Trackers of experiments (`report_to`, `tracker_options`), and LLaMA-Factory's and transformers' keys for them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from dataflex.config.sections.fields import check, names_of, shown, to_choice, to_names
from dataflex.utils.errors import UserError

if TYPE_CHECKING:
    from dataflex.config.schema import Config

# Those of DeepSpeed's monitors, then those that are written to here.
MONITORS = ("tensorboard", "wandb", "csv", "comet")
OWN = ("swanlab", "mlflow", "trackio")
TRACKERS = (*MONITORS, *OWN)
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"} | {name: name for name in OWN}
SWITCH = "use_swanlab"
_OPTIONS = {
    "swanlab_project": ("swanlab", "project"),
    "swanlab_workspace": ("swanlab", "workspace"),
    "swanlab_run_name": ("swanlab", "name"),
    "swanlab_mode": ("swanlab", "mode"),
    "swanlab_logdir": ("swanlab", "log_dir"),
    "trackio_space_id": ("trackio", "space_id"),
    "project": ("trackio", "project"),
}
KEYS = (SWITCH, *_OPTIONS)
_SECRET = re.compile(r"api_?key|password|secret|token", re.IGNORECASE)


def _to_report(value: Any) -> tuple[str, ...]:
    """Trackers, or ``all``: those whose packages are installed."""
    names = () if value is False else to_names(value)
    if names in ((), ("none",), ("no",), ("off",)):
        return ()
    one = to_choice(("none", "all", *TRACKERS), {"comet_ml": "comet"})
    return tuple(name for name in map(one, names) if name != "none")


def _to_options(value: Any) -> dict[str, dict[str, Any]]:
    """{tracker: options}; no secrets, which config.yaml would hold."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping such as {{swanlab: {{project: mine}}}}, got {shown(value)}")
    for name, options in value.items():
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {shown(name)}, expected {', '.join(TRACKERS)}")
        if not isinstance(options, Mapping):
            raise ValueError(f"expected a mapping of options for {name}, got {shown(options)}")
        for key in options:
            if _SECRET.search(str(key)):
                raise ValueError(f"{name}.{key} is a secret, which config.yaml would hold: set it in the environment")
    return {name: {str(key): option for key, option in options.items()} for name, options in value.items()}


Report = Annotated[tuple[str, ...], check(_to_report)]
TrackerOptions = Annotated[dict[str, dict[str, Any]] | None, check(_to_options)]


def added(asked: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(our keys that ``asked`` makes of ``values``, notes as (key, text)).

    asked: those of `KEYS` that are given. values: our own keys, as given. ValueError, with the key and a text for the
    user, where they do not go together.
    """
    switch = asked.get(SWITCH)
    if not isinstance(switch, bool | None):
        raise ValueError(SWITCH, f"expected true or false, got {shown(switch)}")
    names = [name for name in names_of(values.get("report_to") or None) if name not in ("none", "no", "off")]
    made: dict[str, Any] = {}
    if switch and "swanlab" not in names:
        made["report_to"] = names = [*names, "swanlab"]
    given = values.get("tracker_options") or {}
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        return made, []  # which the field itself says
    options = {name: dict(own) for name, own in given.items()}
    notes = []
    for key, (name, option) in _OPTIONS.items():
        if asked.get(key) in (None, False):
            continue
        if name in names:
            options.setdefault(name, {}).setdefault(option, asked[key])
            made["tracker_options"] = options
        else:
            notes.append((key, f"not used without report_to: {name}"))
    return made, notes


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def reported_to(cfg: Config) -> tuple[str, ...]:
    """The trackers of report_to; of ``all`` those whose packages are installed."""
    asked = cfg.output.report_to
    every = (name for name, package in PACKAGES.items() if _installed(package))
    return tuple(dict.fromkeys((*(name for name in asked if name != "all"), *(every if "all" in asked else ()))))


def check_installed(cfg: Config) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in reported_to(cfg):
        if name in PACKAGES and not _installed(PACKAGES[name]):
            raise UserError(f"report_to: {name} needs the package {PACKAGES[name]}, which is not installed")


def nothing_reported(cfg: Config) -> str:
    """What is to be said of ``report_to: all`` where no package is installed, or ''."""
    if "all" not in cfg.output.report_to or reported_to(cfg):
        return ""
    return f"all: none of {', '.join(PACKAGES.values())} is installed, so nothing is reported"
