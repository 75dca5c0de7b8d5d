"""SwanLab, MLflow and Trackio: packages of their own, imported where a run reports to them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from dataflex.config import Config
from dataflex.config.trackers import OWN

PROJECT = "dataflex"
# Of MLflow: params in one call, and characters of a value that every of its stores takes.
_AT_ONCE, _LONGEST = 100, 250


class Tracker:
    """One run in a tracker of `OWN`. options: of its ``init``; MLflow: experiment_name, and those of ``start_run``.

    Where the tracker is and who we are there comes from its own variables of the environment.
    """

    def __init__(self, name: str, run_name: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.name = name
        self._package: Any = importlib.import_module(name)
        given = dict(options)
        if name == "mlflow":
            self._package.set_experiment(given.pop("experiment_name", PROJECT))
            self._package.start_run(**{"run_name": run_name} | given)
            params = [(key, str(value)[:_LONGEST]) for key, value in config.items()]
            for start in range(0, len(params), _AT_ONCE):
                self._package.log_params(dict(params[start : start + _AT_ONCE]))
            return
        again = {"resume": "allow"} if name == "trackio" else {}
        self._package.init(**{"project": PROJECT, "name": run_name, "config": dict(config)} | again | given)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The figures of an optimizer step."""
        if self.name == "mlflow":
            self._package.log_metrics({re.sub(r"[^\w\-./ ]", "_", key): v for key, v in values.items()}, step=step)
        else:
            self._package.log(dict(values), step=step)

    def finish(self) -> None:
        """Write what is not yet written."""
        self._package.end_run() if self.name == "mlflow" else self._package.finish()


def trackers(cfg: Config, names: tuple[str, ...]) -> list[Tracker]:
    """Those of ``names`` that are written to here, started; for rank 0."""
    options, run_name = cfg.output.tracker_options or {}, cfg.output.run_name or "dataflex"
    return [Tracker(name, run_name, cfg.dump_flat(), options.get(name, {})) for name in names if name in OWN]
