"""The hooks of the components that a config names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from dataflex.config import Config
from dataflex.config.components import KIND_NAMES, component_params
from dataflex.core.context import Accelerator, Run
from dataflex.core.hook import Hook, Planner
from dataflex.core.registry import REGISTRY, RUNTIME
from dataflex.core.weights import StaticWeights
from dataflex.data.streams.stream_pool import StreamPool
from dataflex.data.subtasks import MOST_PARTS, Subtasks
from dataflex.train.mixer.mixture import mixture_of
from dataflex.train.trainer.components import subtask_column
from dataflex.train.trainer.mix_trainer import mix_planner
from dataflex.train.trainer.sample_trainer import WeightedPlanner
from dataflex.train.trainer.select_trainer import SelectPlanner
from dataflex.train.trainer.static_trainer import StaticPlanner
from dataflex.train.trainer.stream_trainer import StreamHook
from dataflex.train.trainer.token_trainer import TokenWeightHook
from dataflex.train.trainer.weight_trainer import WeightHook
from dataflex.train.weighter.token_weighter import TokenWeighter
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config.schema import Kind


class HookBuilder:
    """Builds the hooks that a config names, with the runtime objects that components may ask for."""

    def __init__(self, run: Run, cfg: Config, weights: StaticWeights, collator: Any, tokenizer: Any) -> None:
        self.run, self.flex, self.weighting, self.weights = run, cfg.flex, cfg.weighting, weights
        self.tokenizer, self.collator = tokenizer, collator
        self.column = subtask_column(cfg)
        self.manager = mixture_of(run.pool, cfg.flex, run.seed)
        self.runtime: dict[str, Any] = {
            "dataset": run.pool,
            "accelerator": Accelerator(torch.device(run.engine.device)),
            "data_collator": collator,
            "cache_dir": str(run.output_dir / "cache") if run.output_dir else "",
            "output_dir": str(run.output_dir or ""),
            "tokenizer": tokenizer,
            "mixture_manager": self.manager,
        }

    def hooks(self) -> list[Hook]:
        """Planner first, then what keeps streams in place, then the weight hook."""
        assert set(self.runtime) == set(RUNTIME), "what is offered is what `RUNTIME` names"
        found: list[Hook] = [self._planner()]
        if isinstance(self.run.pool, StreamPool):
            found.append(StreamHook(self.run.pool))
        if "weight" in self.flex.kinds:
            weighter, name = self._component("weight")
            if isinstance(weighter, TokenWeighter):
                return [*found, TokenWeightHook(weighter, name, self.flex.warmup_step)]
            static = self.weights.loss is not None or self.weights.corrected
            found.append(WeightHook(weighter, name, self.flex.warmup_step, static))
        return found

    def _planner(self) -> Planner:
        selection = self._selection() if "select" in self.flex.kinds else None
        if "mix" in self.flex.kinds:
            mixer, name = self._component("mix") if not self.flex.mixes_fixed else (None, self._fixed_rule)
            planner = mix_planner(self.manager, mixer, name, self.collator, self.flex.warn_domain_epochs)
            planner.selection = selection
            return planner
        if isinstance(self.run.pool, StreamPool):
            return mix_planner(self.manager, None, "static", self.collator, self.flex.warn_domain_epochs)
        if selection is not None:
            return selection
        if self.weights.draw is not None:
            return WeightedPlanner(self.weights.draw, self.weighting.with_replacement)
        return StaticPlanner()

    def subtasks(self) -> Subtasks | None:
        """Of the target by its column, whose losses an evaluation tells; None without one."""
        target = self.runtime["eval_dataset"]
        if self.column is None or target is None:
            return None
        found = Subtasks.of(target, self.column)
        if len(found.names) > MOST_PARTS:
            logger.warning(
                f"subtask_column: {self.column} has {len(found.names):,} values; losses are told of {MOST_PARTS} at "
                "most, so of none of them"
            )
        return found

    @property
    def _fixed_rule(self) -> str:
        return "static" if self.flex.static_mix else self.flex.mixture_sample_rule

    def _selection(self) -> SelectPlanner:
        selector, name = self._component("select")
        if "mix" in self.flex.kinds and not selector.takes_domain_counts:
            raise UserError(
                f"component_name: selector '{name}' does not say that it heeds domain_counts, so no mixer can be "
                "combined with it (takes_domain_counts = True in its class)"
            )
        return SelectPlanner(selector, name, self.tokenizer)

    def _component(self, kind: Kind) -> tuple[Any, str]:
        name, params = component_params(self.flex, kind)
        asked = inspect.signature(REGISTRY.get(KIND_NAMES[kind], name)).parameters
        if kind == "mix" and self.runtime["mixer_eval_dataset"] is not None and "mixer_eval_dataset" not in asked:
            logger.warning(f"mixer_eval_dataset: not used, since mixer '{name}' evaluates nothing")
        if kind == "select" and "subtask_column" in asked:
            params["subtask_column"] = self.column
        return REGISTRY.build(KIND_NAMES[kind], name, runtime=self.runtime, cfg=params), name
