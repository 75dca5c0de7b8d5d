"""The hook that asks a mixer: initial proportions first, then one decision per phase."""

from __future__ import annotations

import json
from typing import Any

from dataflex.core.context import Run
from dataflex.core.hook import Planner
from dataflex.core.plan import Floats, Phase, Plan, check_proportions
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.mixer.mixture import MixtureManager
from dataflex.train.trainer.decisions import write_decision
from dataflex.utils import dist
from dataflex.utils.logging import logger


class MixPlanner(Planner):
    """Turns proportions into the plan of a phase. Without a mixer the initial proportions stay."""

    def __init__(self, manager: MixtureManager, mixer: Mixer | None, name: str, data_collator: Any = None) -> None:
        self.manager = manager
        self.mixer = mixer
        self.name = name
        self.data_collator = data_collator

    def plan(self, run: Run, phase: Phase) -> Plan:
        proportions = self.manager.proportions
        if phase.decides and self.mixer is not None:
            proportions = self._ask(run, self.mixer)
        plan = self.manager.draw(proportions, phase.steps * run.global_batch, phase.index)
        self._record(run, proportions)
        return plan

    def _ask(self, run: Run, mixer: Mixer) -> Floats:
        answer = mixer.mix(run.engine.module, step_id=run.step, dataset=run.pool, data_collator=self.data_collator)
        run.engine.module.train()
        proportions = check_proportions(
            dist.broadcast_object(answer),
            names=self.manager.names,
            source=f"mixer '{self.name}' at step {run.step}",
        )
        write_decision(
            run, self.name, {"proportions": dict(zip(self.manager.names, proportions.tolist(), strict=True))}
        )
        return proportions

    def _record(self, run: Run, proportions: Floats) -> None:
        named = dict(zip(self.manager.names, proportions.tolist(), strict=True))
        shown = ", ".join(f"{name} {value:.1%}" for name, value in named.items())
        logger.info(f"step {run.step}: {self.name} mixes {shown}")
        if run.output_dir is not None and run.is_main:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            with (run.output_dir / f"{self.name}_weights.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": run.step, "weights": named}) + "\n")

    @property
    def identity(self) -> str:
        return f"MixPlanner {self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.manager.state_dict(),
            "mixer": {} if self.mixer is None else self.mixer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.manager.load_state_dict(state["mixture"])
        if self.mixer is not None:
            self.mixer.load_state_dict(state["mixer"])
