"""How a run is trained: batches, optimizer, schedule, precision, engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from dataflex.config import deepspeed_json
from dataflex.config.sections.fields import (
    AboveZero,
    DeepSpeedConfig,
    Epochs,
    Flag,
    NotNegative,
    OptionalAboveZero,
    OptionalFlag,
    OptionalSeed,
    Positive,
    PositiveOrOff,
    Seconds,
    Seed,
    Share,
    ShareBelowOne,
    Weights,
    choice,
)
from dataflex.config.sections.schedule import SCHEDULERS, SchedulerOptions
from dataflex.config.sections.section import Section
from dataflex.config.sections.steps import WarmupSteps

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


class TrainSection(Section):
    """How it is trained. ``learning_rate`` etc. fill the "auto" values of the DeepSpeed config.

    warmup_steps: steps, or a share of all; where it is not 0, warmup_ratio is not used. loraplus_lr_ratio: of the
    learning rates of LoRA's B and A. neftune_noise_alpha: of noise on embeddings while training, never while scoring or
    evaluating. tf32: None leaves torch's choice. data_seed: of the samples' order and draws, by default ``seed``.
    """

    per_device_train_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    per_device_eval_batch_size: Positive = 8
    learning_rate: NotNegative = 5e-5
    lr_scheduler_type: Annotated[str, choice(*SCHEDULERS)] = "linear"
    lr_scheduler_kwargs: SchedulerOptions = None
    warmup_ratio: Share = 0.0
    warmup_steps: WarmupSteps = 0
    num_train_epochs: Epochs = 3.0
    max_steps: PositiveOrOff = -1
    bf16: Flag = False
    fp16: Flag = False
    seed: Seed = 42
    data_seed: OptionalSeed = None
    optim: Annotated[str, choice(*OPTIMIZERS, adamw_hf="adamw_torch", adamw="adamw_torch")] = "adamw_torch"
    adam_beta1: ShareBelowOne = 0.9
    adam_beta2: ShareBelowOne = 0.999
    adam_epsilon: AboveZero = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    deepspeed: DeepSpeedConfig = None
    ddp_timeout: Seconds = 1800
    group_by_length: Flag = False
    layer_lr_multipliers: Weights = None
    loraplus_lr_ratio: OptionalAboveZero = None
    neftune_noise_alpha: OptionalAboveZero = None
    tf32: OptionalFlag = None
    fused_head: Annotated[Literal["auto", "on", "off"], choice("auto", "on", "off")] = "auto"
    nonfinite: Annotated[Literal["stop", "skip"], choice("stop", "skip")] = "stop"
    nonfinite_limit: Positive = 10

    @property
    def order_seed(self) -> int:
        """The seed that plans are drawn from."""
        return self.seed if self.data_seed is None else self.data_seed

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config as a new dict ("auto" values as they are); empty where none is named."""
        return deepspeed_json.read(self.deepspeed)
