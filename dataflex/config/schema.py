"""The config: frozen sections, one per room of the package. A flat YAML key belongs to exactly one section.

Units: *_steps, *_step count optimizer steps; batch sizes count samples (or packs) per process; cutoff_len tokens.
Keys and defaults follow LLaMA-Factory and transformers where they have the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from dataflex.config.sections.export import ExportSection
from dataflex.config.sections.fields import (
    AboveZero,
    ComponentParams,
    Components,
    Count,
    Flag,
    Layers,
    LongText,
    Names,
    NotNegative,
    OptionalAboveZero,
    OptionalCount,
    OptionalFlag,
    OptionalPositive,
    OptionalText,
    Positive,
    PositiveOrOff,
    Proportions,
    Resume,
    ShareBelowOne,
    Text,
    ValSize,
    choice,
    choices,
)
from dataflex.config.sections.score import ScoreSection
from dataflex.config.sections.section import Section
from dataflex.config.sections.steps import OptionalSteps, Steps
from dataflex.config.sections.train import TrainSection
from dataflex.config.sections.weighting import WeightingSection
from dataflex.config.trackers import Report, TrackerOptions

Kind = Literal["select", "mix", "weight"]
KINDS: tuple[Kind, ...] = ("select", "mix", "weight")


class ModelSection(Section):
    """Which weights to start from. model_revision, cache_dir: of the Hub and of what is downloaded from there."""

    model_name_or_path: Text = ""
    adapter_name_or_path: OptionalText = None
    trust_remote_code: Flag = False
    model_revision: Text = "main"
    cache_dir: OptionalText = None
    train_from_scratch: Flag = False
    flash_attn: Annotated[
        Literal["auto", "disabled", "sdpa", "fa2"],
        choice("auto", "disabled", "sdpa", "fa2", flash_attention_2="fa2", eager="disabled"),
    ] = "auto"
    new_special_tokens: Names = ()
    resize_vocab: Flag = False


class MethodSection(Section):
    """What is trained."""

    stage: Annotated[Literal["sft", "pt"], choice("sft", "pt")] = "sft"
    do_train: Flag = True
    finetuning_type: Annotated[Literal["lora", "full", "freeze"], choice("lora", "full", "freeze")] = "lora"
    lora_rank: Positive = 8
    lora_alpha: OptionalPositive = None
    lora_dropout: ShareBelowOne = 0.0
    use_rslora: Flag = False
    lora_target: Names = ("all",)
    additional_target: Names = ()
    freeze_trainable_layers: Layers = 2
    freeze_trainable_modules: Names = ("all",)
    freeze_extra_modules: Names = ()
    gradient_checkpointing: Flag = True
    disable_gradient_checkpointing: Flag = False
    use_reentrant_gc: Flag = True

    @property
    def lora_scale_alpha(self) -> int:
        """lora_alpha, by default twice the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2 * self.lora_rank

    @property
    def checkpoint_activations(self) -> bool:
        """Whether activations are recomputed; ``disable_gradient_checkpointing`` wins."""
        return self.gradient_checkpointing and not self.disable_gradient_checkpointing


class DataSection(Section):
    """What it is trained on. Dataset names are entries of ``dataset_dir``/dataset_info.json.

    subtask_column: a column of what is evaluated, whose values are its subtasks, as its datasets are without.
    streaming: read the datasets as training goes on, endlessly, ``buffer_size`` rows shuffled at a time.
    """

    dataset: Names = ()
    eval_dataset: Names = ()
    dataset_dir: Text = "data"
    template: OptionalText = None
    default_system: LongText = None
    enable_thinking: Flag = True
    cutoff_len: Positive = 2048
    max_samples: OptionalPositive = None
    train_on_prompt: Flag = False
    mask_history: Flag = False
    val_size: ValSize = 0.0
    subtask_column: LongText = None
    packing: OptionalFlag = None
    neat_packing: Flag = False
    streaming: Flag = False
    buffer_size: Positive = 16384
    tokenized_path: OptionalText = None
    overwrite_cache: Flag = False
    preprocessing_num_workers: OptionalPositive = None
    dataloader_num_workers: Count = 0
    sample_weight: LongText = None


class OutputSection(Section):
    """What is written, where and how often, and when the run is ended on request.

    resume_from_checkpoint: ``auto`` goes on where there is something to go on from, and else starts. max_hours: of
    one start of the run. stop_grace_seconds: what whoever sends a SIGTERM waits before a SIGKILL. logging_steps,
    save_steps, eval_steps: steps, or a share of all steps. metric_for_best_model: by default eval_loss.
    tracker_options: {tracker: options of its own}.
    """

    output_dir: Text = ""
    overwrite_output_dir: Flag = False
    resume_from_checkpoint: Resume = None
    logging_steps: Steps = 10
    save_steps: Steps = 500
    save_total_limit: OptionalPositive = None
    save_strategy: Annotated[Literal["steps", "epoch", "no"], choice("steps", "epoch", "no")] = "steps"
    save_only_model: Flag = False
    plot_loss: Flag = False
    report_to: Report = ()
    tracker_options: TrackerOptions = None
    run_name: OptionalText = None
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], choice("no", "steps", "epoch")] = "no"
    eval_steps: OptionalSteps = None
    load_best_model_at_end: Flag = False
    metric_for_best_model: LongText = None
    greater_is_better: OptionalFlag = None
    max_hours: OptionalAboveZero = None
    stop_grace_seconds: NotNegative = 30.0

    @property
    def resume_path(self) -> str | None:
        """The checkpoint that resume_from_checkpoint names, if it names one."""
        named = self.resume_from_checkpoint
        return named if isinstance(named, str) and named != "auto" else None

    @model_validator(mode="before")
    @classmethod
    def _eval_as_often_as_logged(cls, data: Any) -> Any:
        if data.get("eval_strategy") == "steps" and data.get("eval_steps") is None:
            return {**data, "eval_steps": data.get("logging_steps", 10)}
        return data


class FlexSection(Section):
    """Selection, mixing and weighting: which component decides, and when.

    component_params: {kind: params}, which win over those of the components file. mix_strategy: what a pass over
    several datasets in the initial proportions is: until the first (under) or the last (over) is used up.
    """

    train_type: Annotated[
        tuple[Literal["static", "dynamic_select", "dynamic_mix", "dynamic_weight"], ...],
        choices("static", "dynamic_select", "dynamic_mix", "dynamic_weight", static_full="static"),
    ] = ("static",)
    components_cfg_file: Text = "components.yaml"
    component_name: Components = None
    component_params: ComponentParams = None
    component_modules: Names = ()
    warmup_step: Count = 0
    update_step: OptionalCount = None
    update_times: PositiveOrOff = -1
    train_step: OptionalPositive = None
    mixture_sample_rule: Annotated[
        Literal["mixture", "stratified", "uniform"], choice("mixture", "stratified", "uniform")
    ] = "mixture"
    init_mixture_proportions: Proportions = None
    mix_strategy: Annotated[
        Literal["concat", "interleave_under", "interleave_over"],
        choice("concat", "interleave_under", "interleave_over", "interleave_once", interleave_once="concat"),
    ] = "concat"
    static_mix: Flag = False
    mixer_eval_dataset: Names = ()
    warn_domain_epochs: AboveZero = 4.0
    reference_model_path: OptionalText = None
    proxy_model_name_or_path: OptionalText = None
    proxy_train_step: OptionalPositive = None
    freeze_gate: Flag = False
    weight_normalization: Annotated[
        Literal["mean", "sum_weights", "tokens"], choice("mean", "sum_weights", "tokens")
    ] = "mean"
    scoring_batch_tokens: OptionalPositive = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The dynamic kinds in use, in the order select, mix, weight."""
        return tuple(kind for kind in KINDS if f"dynamic_{kind}" in self.train_type)

    @property
    def mixes_fixed(self) -> bool:
        """Whether proportions never change: ``static_mix``, or a sampling rule other than mixture."""
        return self.static_mix or self.mixture_sample_rule != "mixture"

    def component(self, kind: Kind) -> str | None:
        """The component named for ``kind``; None where the kind is not in use or has none."""
        if kind not in self.kinds:
            return None
        if isinstance(self.component_name, dict):
            return self.component_name.get(kind)
        return self.component_name


class Config(Section):
    """All sections of one run. Built by `dataflex.config.load_config`, which checks what one field cannot."""

    model: ModelSection = ModelSection()
    method: MethodSection = MethodSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    output: OutputSection = OutputSection()
    flex: FlexSection = FlexSection()
    score: ScoreSection = ScoreSection()
    weighting: WeightingSection = WeightingSection()
    export: ExportSection = ExportSection()
    source: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def fixed_steps(self) -> int | None:
        """Total optimizer steps where ``train_step`` or ``max_steps`` fixes them, else None."""
        return self.flex.train_step or (self.train.max_steps if self.train.max_steps > 0 else None)

    @property
    def packs(self) -> bool:
        """Whether samples share rows: ``packing`` where given, else neat_packing or stage pt."""
        if self.data.packing is not None:
            return self.data.packing
        return self.data.neat_packing or self.method.stage == "pt"

    def dump_flat(self) -> dict[str, Any]:
        """The effective config as flat YAML keys and plain values; loading it again gives an equal config."""
        flat: dict[str, Any] = {}
        for name in SECTIONS:
            section = getattr(self, name)
            for key, value in section.model_dump().items():
                if value is not None and (value != () or type(section).model_fields[key].default != ()):
                    flat[key] = list(value) if isinstance(value, tuple) else value
        if len(flat["train_type"]) == 1:
            flat["train_type"] = flat["train_type"][0]
        return flat


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "method": MethodSection,
    "data": DataSection,
    "train": TrainSection,
    "output": OutputSection,
    "flex": FlexSection,
    "score": ScoreSection,
    "weighting": WeightingSection,
    "export": ExportSection,
}
SECTION_OF: dict[str, str] = {key: name for name, section in SECTIONS.items() for key in section.model_fields}
