"""The hooks that ask a mixer: initial proportions first, then one decision per phase."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dataflex.core.clock import SCORE
from dataflex.core.context import Run
from dataflex.core.hook import Planner, Weigher
from dataflex.core.packing import Packing, drawn
from dataflex.core.plan import Floats, Ids, Phase, Plan, check_proportions
from dataflex.ops import SampleLoss
from dataflex.train.decisions.record import write_decision
from dataflex.train.mixer.base_mixer import LearningMixer, Mixer, WeighingMixer
from dataflex.train.mixer.mixture import Mixture
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.utils import dist
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger

SAID_AGAIN_AT = 0.01


def mix_planner(manager: Mixture, mixer: Mixer | None, name: str, data_collator: Any, most_epochs: float) -> MixPlanner:
    """The planner that gives ``mixer`` what it needs."""
    planner = MixPlanner
    if isinstance(mixer, LearningMixer):
        planner = WeighingPlanner if isinstance(mixer, WeighingMixer) else LearningPlanner
    return planner(manager, mixer, name, data_collator, most_epochs)


class MixPlanner(Planner):
    """Turns proportions into the plan of a phase. Without a mixer the initial proportions stay.

    most_epochs: of one domain, before a warning. selection: picks the samples of each domain after the warm-up, as
    many as the proportions make; without it they are drawn in random order.
    """

    selection: SelectPlanner | None = None

    def __init__(
        self,
        manager: Mixture,
        mixer: Mixer | None,
        name: str,
        data_collator: Any = None,
        most_epochs: float = float("inf"),
    ) -> None:
        self.manager = manager
        self.mixer = mixer
        self.name = name
        self.data_collator = data_collator
        self.most_epochs = most_epochs
        self.tokens = np.zeros(len(manager.names), dtype=np.int64)
        self._said: Floats | None = None
        self._warned: set[str] = set()

    def plan(self, run: Run, phase: Phase) -> Plan:
        proportions = self.manager.proportions
        if phase.decides and self.mixer is not None:
            proportions = self._ask(run, self.mixer, phase)
        said, line = self._say(run, proportions, phase), self._line(run, proportions)
        plan = self._draw(run, phase, proportions)
        if run.packing is not None:
            line["packs"] = self._packed(run, run.packing, plan, proportions, said)
        self._record(run, line)
        self._warn(run)
        return plan

    def _ask(self, run: Run, mixer: Mixer, phase: Phase) -> Floats:
        with run.clock.part(SCORE):
            answer = mixer.mix(run.engine.module, step_id=run.step, dataset=run.pool, data_collator=self.data_collator)
        proportions = check_proportions(
            dist.broadcast_object(answer),
            names=self.manager.names,
            source=f"mixer '{self.name}' at step {run.step}",
        )
        if self.selection is None and (phase.steps > 1 or not isinstance(mixer, LearningMixer)):
            write_decision(run, self.name, {"proportions": self._named(proportions)})
        return proportions

    def _draw(self, run: Run, phase: Phase, proportions: Floats) -> Plan:
        manager, before = self.manager, self.manager.state_dict()

        def counts(count: int) -> Ids:
            manager.load_state_dict(before)
            return manager.take(proportions, count)

        def draw(count: int) -> Plan:
            manager.load_state_dict(before)
            return manager.draw(proportions, count, phase.index)

        if self.selection is None or phase.decision == 0:
            plan = drawn(run.packing, draw, phase.steps * run.global_batch)
        else:
            record = {"mixer": self.name, "proportions": self._named(proportions)}
            most = None if self.selection.selector.replacement else manager.most(proportions)
            plan = self.selection.draw(run, phase, counts, most, **record)
        counts(len(plan.sample_ids))  # other numbers may have been tried since
        return plan

    def _packed(self, run: Run, packing: Packing, plan: Plan, proportions: Floats, said: bool) -> dict[str, float]:
        """What is in the rows of a phase. deviation: how far a domain's share of its samples is from its proportion."""
        samples, fill = len(plan.sample_ids), packing.fill(plan)
        found = np.bincount(run.pool.domains_of(plan.sample_ids), minlength=len(proportions)) / samples
        deviation = float(np.abs(found - proportions).max())
        if said:
            what = f"{plan.rows:,} packs of {samples:,} samples, {fill:.1%} full"
            logger.info(f"step {run.step}: {what}, shares within {deviation:.2%} of the proportions")
        return {"rows": plan.rows, "samples": samples, "fill": round(fill, 4), "deviation": round(deviation, 6)}

    def on_train_start(self, run: Run) -> None:
        if self.selection is not None:
            self.selection.on_train_start(run)

    def on_step_end(self, run: Run, batch: Any) -> None:
        self.tokens = self.tokens + run.pool.tokens_of(batch)

    def _named(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.manager.names, values.tolist(), strict=True))

    def _say(self, run: Run, proportions: Floats, phase: Phase) -> bool:
        """On the screen; where every step decides, or nothing does, only what moved a share by a percentage point.

        Whether anything was said.
        """
        often = phase.steps == 1 or self.mixer is None
        if often and self._said is not None and np.abs(proportions - self._said).max() < SAID_AGAIN_AT:
            return False
        self._said = proportions
        shown = ", ".join(f"{name} {value:.1%}" for name, value in self._named(proportions).items())
        logger.info(f"step {run.step}: {self.name} mixes {shown}")
        return True

    def _line(self, run: Run, proportions: Floats) -> dict[str, Any]:
        """The proportions from now on, and what each domain has given so far."""
        return {
            "step": run.step,
            "weights": self._named(proportions),
            "samples": self._named(self.manager.drawn),
            "tokens": self._named(self.tokens),
            "epochs": self._named(self.manager.epochs.round(4)),
            **({} if self.mixer is None else self.mixer.report()),
        }

    def _record(self, run: Run, line: dict[str, Any]) -> None:
        if run.output_dir is None or not run.is_main:
            return
        run.output_dir.mkdir(parents=True, exist_ok=True)
        with (run.output_dir / f"{self.name}_weights.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def _warn(self, run: Run) -> None:
        """Say once of each domain that it is gone over more than ``most_epochs`` times."""
        epochs = self._named(self.manager.epochs)
        for name in [n for n, value in epochs.items() if value > self.most_epochs and n not in self._warned]:
            self._warned.add(name)
            logger.warning(
                f"step {run.step}: domain '{name}' is gone over more than {self.most_epochs:g} times "
                f"({epochs[name]:.1f} by the end of this phase); its samples repeat (warn_domain_epochs)"
            )

    def on_train_end(self, run: Run) -> None:
        self._record(run, self._line(run, self.manager.proportions))

    @property
    def identity(self) -> str:
        return f"MixPlanner {self.name}" + ("" if self.selection is None else f", {self.selection.identity}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.manager.state_dict(),
            "tokens": self.tokens,
            "mixer": {} if self.mixer is None else self.mixer.state_dict(),
            "selection": {} if self.selection is None else self.selection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.manager.load_state_dict(state["mixture"])
        self.tokens = np.asarray(state["tokens"], dtype=np.int64)
        if self.mixer is not None:
            self.mixer.load_state_dict(state["mixer"])
        if self.selection is not None:
            self.selection.load_state_dict(state["selection"])


class LearningPlanner(MixPlanner):
    """A `MixPlanner` whose mixer is shown the losses of every step, summed by domain over the global batch."""

    mixer: LearningMixer
    _sums: Tensor | None = None

    @property
    def needs_logits(self) -> bool:
        """A mixer is shown losses only."""
        return False

    def on_losses(self, run: Run, micro: Any, losses: SampleLoss, outputs: Any) -> None:
        if not self._learns(run):
            return
        domains = self._domains(run, micro, losses.loss.device)
        values = torch.stack([self.mixer.sample_sums(micro, losses), losses.count.double()])
        if self._sums is None:
            self._sums = values.new_zeros(2, len(self.manager.names))
        self._sums.index_add_(1, domains, values)

    def on_step_end(self, run: Run, batch: Any) -> None:
        super().on_step_end(run, batch)
        self._learn()

    def _learns(self, run: Run) -> bool:
        return self.mixer.learns_in_warmup or run.schedule.phase_at(run.step).decision > 0

    def _domains(self, run: Run, micro: Any, device: torch.device) -> Tensor:
        """Domain of each sample of the micro-batch, int64 [S]."""
        return torch.from_numpy(run.pool.domains_of(micro.sample_ids)).to(device)

    def _learn(self) -> None:
        """A collective: every rank has seen as many micro-batches of the step.

        Nothing is learned of a step without a trained token, nor of losses that are not finite.
        """
        if self._sums is not None:
            sums, tokens = dist.all_reduce(self._sums).cpu().numpy()
            if tokens.any() and np.isfinite(sums).all():
                self.mixer.learn(sums, tokens)
            self._sums = None


class WeighingPlanner(LearningPlanner, Weigher):
    """A `LearningPlanner` whose mixer weighs the domains in the loss, from the first decision on.

    Where a step is one micro-batch, its own losses have moved the weights that it is trained with; where it is several,
    they are the weights after the step before, since the first ones are trained before the last are seen.
    """

    mixer: WeighingMixer

    @property
    def compared(self) -> Literal["", "micro-batch", "global micro-batch"]:
        """What a micro-batch is weighed with depends on what is in it, or on how many have gone before in its step."""
        return "global micro-batch"

    def on_losses(self, run: Run, micro: Any, losses: SampleLoss, outputs: Any) -> None:
        super().on_losses(run, micro, losses, outputs)
        if run.accumulation == 1:
            self._learn()

    def weigh(self, run: Run, micro: Any, losses: SampleLoss, outputs: Any) -> Tensor | None:
        if run.schedule.phase_at(run.step).decision == 0:
            return None
        proportions = self.manager.proportions
        weights = np.divide(
            self.mixer.domain_weights(), proportions, out=np.zeros_like(proportions), where=proportions > 0
        )
        mine = torch.from_numpy(weights[run.pool.domains_of(micro.sample_ids)]).to(losses.count.device)
        if self.mixer.weighted_mean:
            counts = losses.count.double()
            weighted, counted = dist.all_reduce(torch.stack([(mine * counts).sum(), counts.sum()]))
            mine = mine * counted / weighted.clamp(min=torch.finfo(torch.float64).tiny)
        return mine.to(losses.loss)

    def on_train_end(self, run: Run) -> None:
        """Write the result beside the steps' lines, with the keys that OpenDCAI/DataFlex uses."""
        super().on_train_end(run)
        if run.output_dir is None or not run.is_main:
            return
        result = {
            "update_times": run.step - run.schedule.phases[0].steps * (run.schedule.phases[0].decision == 0),
            "domain_names": self.manager.names,
            "average_weights": self.mixer.average_weights().tolist(),
        }
        write_atomically(run.output_dir / f"{self.name}_average_weights.json", json.dumps(result, indent=2))
