"""Which layers `lora_target: all` adapts, what it says of the others, and adapters that cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dataflex.config import load_config
from dataflex.engine.models.lora import _trained_whole, check_ahead, with_lora
from dataflex.utils.errors import UserError
from tests import families
from tests import tiny_engine as tiny


def config(**keys: Any) -> Any:
    settings = {"model_name_or_path": "x", "dataset": "x", "output_dir": "x", "finetuning_type": "lora"}
    return load_config(settings | keys, quiet=True)


def adapted(net: nn.Module, **keys: Any) -> set[str]:
    """The last parts of the names of the layers that have an adapter."""
    model = with_lora(net, config(**keys))
    ids = torch.arange(3, 12)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    return {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, p in model.named_parameters() if "lora_A" in n}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("family", "changes", "layers", "said"),
    [
        (
            "phimoe",
            {"num_local_experts": 4},
            ATTENTION,
            "model.layers.*.mlp.router (a PhimoeTopKRouter, with a forward of its own), model.layers.*.mlp.experts",
        ),
        ("mamba", {}, {"in_proj"}, "backbone.layers.*.mixer.out_proj (MambaMixer reads its weight by itself)"),
        ("falcon", {}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, None),
        ("gpt2", {}, {"c_attn", "c_proj", "c_fc"}, None),
        ("llama", {}, {*ATTENTION, "gate_proj", "up_proj", "down_proj"}, None),
    ],
)
def test_every_plain_linear_but_the_output(
    family: str, changes: Any, layers: set[str], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="dataflex"):
        assert adapted(families.model(family, **changes)) == layers
    lines = [line for line in caplog.messages if line.startswith("lora_target: all leaves out")]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


@pytest.mark.parametrize(
    ("family", "target", "text"),
    [
        ("phimoe", "router", r"lora_target: 'router': model\.layers\.0\.mlp\.router \(a PhimoeTopKRouter, with"),
        ("mamba", "out_proj", r"'out_proj': backbone\.layers\.0\.mixer\.out_proj \(MambaMixer reads its weight"),
        ("llama", "q_prj", r"lora_target: the model has no 'q_prj' \(did you mean 'q_proj'\?\)"),
    ],
)
def test_a_target_that_cannot_have_an_adapter(family: str, target: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        with_lora(families.model(family), config(lora_target=target))


@pytest.mark.parametrize(
    ("keys", "whole"),
    [
        ({}, []),
        ({"resize_vocab": True}, ["embed_tokens", "lm_head"]),
        ({"resize_vocab": True, "additional_target": "norm"}, ["norm"]),
        ({"new_special_tokens": "<x>", "additional_target": "norm"}, ["norm", "embed_tokens", "lm_head"]),
        ({"new_special_tokens": "<x>", "additional_target": "lm_head"}, ["lm_head", "embed_tokens"]),
    ],
)
def test_embeddings_are_trained_whole_where_there_are_new_tokens(keys: dict[str, Any], whole: list[str]) -> None:
    net = families.model("llama")
    assert _trained_whole(net, config(**keys)) == whole


def test_layers_of_gpt2_can_be_named() -> None:
    assert adapted(families.model("gpt2"), lora_target="c_attn") == {"c_attn"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_only_lora_adapters_are_trained_on(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    get_peft_model(families.model("llama"), prompt).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an adapter of type PROMPT_TUNING; valid: LORA"):
        with_lora(families.model("llama"), config(adapter_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match="adapter_name_or_path: no fitting adapter at 'nowhere'"):
        with_lora(families.model("llama"), config(adapter_name_or_path="nowhere"))


def test_wrong_names_are_told_before_the_weights_are_there_whatever_zero3_partitions() -> None:
    """As where the caller's own program has a DeepSpeed config of stage 3 alive for transformers."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    model = tiny.model("full").config
    with pytest.raises(UserError, match=r"lora_target: .*'q_prj'.*q_proj"):
        check_ahead(config(lora_target=["q_prj"]), model)
    check_ahead(config(lora_target=["q_proj"]), model)
    assert is_deepspeed_zero3_enabled()
    del alive
