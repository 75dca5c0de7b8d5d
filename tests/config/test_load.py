# ruff: noqa: E501 - whole lines of text are easier to search for
"""Every wrong config gets its line: a table of YAML text -> expected line, and how lines are gathered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from dataflex.config import Config, load_config
from dataflex.config.foreign.keys import spelling, table
from dataflex.config.schema import SECTION_OF
from dataflex.utils.errors import UserError
from tests.config.wrong_configs import FOREIGN, MIX, RULES, SELECT, STREAM, STREAMING, TYPES, WEIGHT

GOOD = {"model_name_or_path": "org/model", "dataset": "a,b", "output_dir": "out"}
GOOD |= {"per_device_train_batch_size": "8", "lr_scheduler_type": "linear"}


def load(folder: Path, text: str, overrides: Sequence[str] = ()) -> Config:
    """Load ``text`` as run.yaml, completed by the required keys that it lacks."""
    given = {spelling(line.partition(":")[0]) for line in text.splitlines()}
    rest = "".join(f"{key}: {value}\n" for key, value in GOOD.items() if key not in given)
    (folder / "run.yaml").write_text(f"{text}\n{rest}", encoding="utf-8")
    return load_config(folder / "run.yaml", overrides)


def lines_of(folder: Path, text: str, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text, overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


@pytest.mark.parametrize(("text", "line"), TYPES + RULES + FOREIGN + STREAMING)
def test_wrong_config_gets_one_clear_line(tmp_path: Path, text: str, line: str) -> None:
    assert lines_of(tmp_path, text) == [f"run.yaml:{line}"]


def test_all_problems_are_reported_at_once_and_wrong_keys_do_not_cause_others(tmp_path: Path) -> None:
    text = "learning_rat: 1\nbf16: maybe\nfp16: true\ntrain_type: dynamic_weight\nval_size: x\neval_dataset: c"
    assert lines_of(tmp_path, text, ["cutoff_len=0"]) == [
        "run.yaml:learning_rat: unknown key (did you mean 'learning_rate'?)",
        "command line:cutoff_len: expected a whole number >= 1, got 0",
        "run.yaml:val_size: expected a fraction >= 0 and < 1, or a whole number of samples >= 2, got 'x'",
        "run.yaml:bf16: expected true or false, got 'maybe'",
        "run.yaml:component_name: missing, dynamic_weight needs a component",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "command line: 'seed' is not of the form key=value (write seed=VALUE)"),
        ("sed", "command line: 'sed' is not of the form key=value (did you mean 'seed'?)"),
        ("=3", "command line: '=3' is not of the form key=value"),
        ("lora_rnk=3", "command line:lora_rnk: unknown key (did you mean 'lora_rank'?)"),
        ("dataset=[a", "command line:dataset:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("evaluation_strategy=x", "command line:evaluation_strategy: expected one of no, steps, epoch, got 'x'"),
    ],
)  # fmt: skip
def test_wrong_override(tmp_path: Path, override: str, line: str) -> None:
    assert lines_of(tmp_path, "", [override]) == [line]


def test_overrides_replace_yaml_values_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = ["learning_rate=1e-4", "eval_strategy=no", "dataset=x,y", "seed=1", "seed=2", "template="]
    cfg = load(tmp_path, "learning_rate: 3.0\nevaluation_strategy: steps\ntemplate: qwen\n", overrides)
    assert cfg.train.learning_rate == 1e-4
    assert (cfg.output.eval_strategy, cfg.data.dataset, cfg.train.seed) == ("no", ("x", "y"), 2)
    assert cfg.data.template is None


def test_other_spellings_set_the_keys_that_they_mean(tmp_path: Path) -> None:
    text = "evaluation_strategy: epoch\nval_size: 0.1\nper_gpu_train_batch_size: 3\nper_gpu_eval_batch_size: 5\n"
    text += "add_special_tokens: <a>,<b>\nactivation_checkpointing: false"
    cfg = load(tmp_path, text)
    assert cfg.output.eval_strategy == "epoch"
    assert (cfg.train.per_device_train_batch_size, cfg.train.per_device_eval_batch_size) == (3, 5)
    assert (cfg.model.new_special_tokens, cfg.method.gradient_checkpointing) == (("<a>", "<b>"), False)
    assert set(table().spellings) == {line.partition(":")[0] for line in text.splitlines()} - {"val_size"}


def test_translated_keys_set_the_keys_that_they_are(tmp_path: Path) -> None:
    text = "gradient_checkpointing_kwargs: {use_reentrant: false}\npure_bf16: true\nfinetuning_type: full\n"
    cfg = load(tmp_path, text + "train_sampling_strategy: group_by_length\n")
    assert (cfg.method.use_reentrant_gc, cfg.train.bf16, cfg.train.group_by_length) == (False, True, True)
    text = "activation_checkpointing_kwargs: {use_reentrant: false}\ntrain_sampling_strategy: random\n"
    cfg = load(tmp_path, text + "gradient_checkpointing_kwargs: null\n")
    assert (cfg.method.use_reentrant_gc, cfg.train.group_by_length) == (False, False)


def test_the_defaults_that_were_filled_in_are_named() -> None:
    given = {"model_name_or_path": "org/model", "dataset": "a,b", "output_dir": "out"}
    of_transformers = ", as in LLaMA-Factory and transformers"
    batch = f"config:per_device_train_batch_size: not given, so 8{of_transformers}"
    schedule = f"config:lr_scheduler_type: not given, so linear{of_transformers}"
    cfg = load_config(given, quiet=True)
    assert cfg.notes == (batch, schedule)
    assert (cfg.train.per_device_train_batch_size, cfg.train.lr_scheduler_type) == (8, "linear")
    assert load_config({**given, "per_device_train_batch_size": 8}, quiet=True).notes == (schedule,)
    own = {"scheduler": {"type": "WarmupLR"}}
    assert load_config({**given, "deepspeed": own}, quiet=True).notes == (batch,)
    assert load_config({}, embedded=True, quiet=True).notes == ()
    assert load_config(cfg.dump_flat(), quiet=True).notes == ()


@pytest.mark.parametrize("value", ["null", "false"])
def test_no_key_set_to_nothing_is_an_error(tmp_path: Path, value: str) -> None:
    """But for what a run cannot do without, and where false asks for something."""
    rows = (*table().refused, *table().ignored)
    names = [*SECTION_OF, *table().spellings, *table().translated, *(key.replace("*", "x") for key, _ in rows)]
    for key in dict.fromkeys(names):
        if key not in (*GOOD, "do_train", "sampling_replacement"):
            given = {name: own for name, own in GOOD.items() if value == "null" or name != spelling(key)}
            load_config({**given, key: None if value == "null" else False}, quiet=True)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "run.yaml: the config file is empty"),
        (b"# nothing\n", "run.yaml: the config file is empty"),
        (b"- a\n", "run.yaml: expected 'key: value' lines at the top level, got a list"),
        (b"just text\n", "run.yaml: expected 'key: value' lines at the top level, got a text"),
        (b"3: x\n", "run.yaml: key 3 is a number, expected text"),
        (b"seed: 1\ndataset: \xff\n", "run.yaml:2: not UTF-8 text (byte 0xff)"),
        (b"seed: 1\nstage: pt\nseed: 2\n", "run.yaml:3: key 'seed' is given twice (first in line 1)"),
        (b"deepspeed:\n  a: 1\n  a: 2\n", "run.yaml:3: key 'a' is given twice (first in line 2)"),
        (b"seed: 1\n\tdataset: a\n", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        (b"seed: !!python/name:os.system x\n", "run.yaml:1: not valid YAML: could not determine a constructor "
         "for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ],
)  # fmt: skip
def test_unreadable_file(tmp_path: Path, data: bytes, line: str) -> None:
    (tmp_path / "run.yaml").write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml")
    assert str(caught.value).replace(f"{tmp_path}/", "") == line


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "less.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"les\.yaml: the config file does not exist \(did you mean 'less.yaml'\?\)"):
        load_config(tmp_path / "les.yaml")
    with pytest.raises(UserError, match=r"does not exist \(nor the folder '.*/no'\)"):
        load_config(tmp_path / "no" / "less.yaml")
    with pytest.raises(UserError, match="the config file is a folder, expected a file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("image_max_pixels: 262144", "image_max_pixels: ignored: only text is trained on"),
        ("freeze_vision_tower: true", "freeze_vision_tower: ignored: only text is trained on"),
        ("swanlab_project: p", "swanlab_project: not used without report_to: swanlab"),
        ("push_to_hub: true", "push_to_hub: ignored: nothing is uploaded"),
        ("mix_strategy: interleave_once\ninterleave_probs: [0.5, 0.5]", "interleave_probs: not used: every sample comes "
         "once, in the order of the plan"),
        ("greater_is_better: true", "greater_is_better: not used without load_best_model_at_end: true"),
        ("deepspeed: examples/deepspeed/ds_z2_offload_config.json", "deepspeed: "
         "'examples/deepspeed/ds_z2_offload_config.json' does not exist, so dataflex's own ds_zero2_offload.json is used"),
        ("do_sample: false", "do_sample: ignored: nothing is generated"),
        ("packin: false", "packin: ignored: unknown key (did you mean 'packing'?), and false asks for nothing"),
        ("template: false", "template: false asks for nothing, so the key is left out"),
        ("init_special_tokens: noise_init", "init_special_tokens: ignored: the key is not supported, and noise_init "
         "asks for nothing"),
        ("pref_beta: 0.1", "pref_beta: ignored: only the stages rm, ppo, dpo and kto use it"),
        ("use_liger_kernel: true", "use_liger_kernel: ignored: dataflex's own loss is used, without Liger's kernels; "
         "what is trained is the same"),
        ("pure_bf16: true", "pure_bf16: taken as bf16: true: the model is in bf16, and DeepSpeed updates it in fp32"),
        ("pure_bf16: false", "pure_bf16: ignored: the key is not supported, and false asks for nothing"),
        ("quantization_bit: null", "quantization_bit: ignored: the key is not supported, and null asks for nothing"),
        ("some_other_tool: false", "some_other_tool: ignored: unknown key, and false asks for nothing"),
        ("ddp_timeout: 180000000", "ddp_timeout: 180000000 s are 2,083 days: a hang would not end by itself"),
        ("save_only_model: yes", "save_only_model: true: checkpoints lack the optimizer, so an exact resume is not "
         "possible"),
        ("eval_steps: 5", "eval_steps: not used: eval_strategy is 'no'"),
        ("warmup_steps: 0.25\nwarmup_ratio: 0.1", "warmup_ratio: not used: warmup_steps is 0.25"),
        ("component_name: less\nupdate_step: 5", "component_name: not used by train_type static: component_name, "
         "update_step"),
        (WEIGHT + "update_times: 5", "update_times: not used by train_type dynamic_weight: update_times"),
        ("packing: true", "packing: the samples of a row do not see one another, as with neat_packing; in LLaMA-Factory "
         "without it they do"),
        ("neat_packing: true\ngroup_by_length: true", "group_by_length: not used: packs are all about as long"),
        (MIX + "dataset: a", "dataset: dynamic_mix has one dataset, so there is nothing to mix"),
    ],
)  # fmt: skip
def test_what_is_allowed_but_ignored_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, note: str
) -> None:
    cfg = load(tmp_path, textwrap.dedent(text) + "\n")
    assert [n.replace(f"{tmp_path}/", "") for n in cfg.notes] == [f"run.yaml:{note}"]
    assert capfd.readouterr().err.count(note) == 1
    assert load_config(tmp_path / "run.yaml", quiet=True).notes == cfg.notes
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    [
        "train_type: dynamic_mix\nstatic_mix: true\ninit_mixture_proportions: [0.7, 0.3]\ntrain_step: 3",
        "train_type: dynamic_mix\nmixture_sample_rule: uniform",
        MIX + "static_mix: true",
        SELECT + "update_times: 3",
        SELECT.replace("random", "less") + "val_size: 0.1",
        SELECT.replace("random", "mine") + "component_modules: my_pkg.my_selector",
        "train_type: [dynamic_mix, dynamic_weight]\nupdate_step: 1\ncomponent_name: {mix: random, weight: loss}",
        "train_type: [dynamic_select, dynamic_weight]\nupdate_step: 1\ncomponent_name: {select: loss, weight: loss}",
        "max_steps: 5\ntrain_step: 5",
        "train_type: static_full",
        "mix_strategy: concat",
        "mix_strategy: interleave_over",
        "neat_packing: true",
        "stage: pt\npacking: true",
        "stage: pt\nstreaming: true\nmax_steps: 3",
        "ddp_timeout: 604800",
    ],
)
def test_good_combinations_load_without_a_note(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text + "\n").notes == ()


def test_embedded_configs_need_no_model_data_or_output(tmp_path: Path) -> None:
    cfg = load_config({"train_type": "dynamic_select", "component_name": "less", "update_step": 3}, embedded=True)
    assert cfg.flex.component("select") == "less"
    assert cfg.source is None
    with pytest.raises(UserError, match="config:update_step: dynamic_select needs"):
        load_config({"train_type": "dynamic_select", "component_name": "less"}, embedded=True)


@pytest.mark.parametrize(
    "text",
    [
        STREAM + "init_mixture_proportions: [3, 1]",
        "streaming: true\nupdate_times: 3\n" + MIX,
        STREAM + WEIGHT,
        STREAM + "eval_dataset: c\nrole_weights: {answer: 2}\ndomain_weights: {a: 2}",
        STREAM + MIX.replace("random", "dynamic_moe") + "mixer_eval_dataset: a,b",
    ],
)
def test_what_streams_do_is_taken_without_a_note(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).notes == ()


def test_streams_know_no_loader_workers_and_no_embedding(tmp_path: Path) -> None:
    note = "dataloader_num_workers: not used: streams are read in the training process"
    assert load(tmp_path, STREAM + "dataloader_num_workers: 2").notes == (f"{tmp_path}/run.yaml:{note}",)
    with pytest.raises(UserError, match="streaming: true is for dataflex-cli train; dataflex.initialize takes"):
        load_config({"streaming": True}, embedded=True)


TOKENS: list[tuple[str, tuple[str, ...], object, object, str]] = [
    ("use_dft_loss: true", ("dynamic_weight",), {"weight": "dft"}, None, "tokens"),
    ("use_dft_loss: false\ntrain_type: static", ("static",), None, None, "mean"),
    (
        "use_eaft_loss: true\neaft_alpha: 0.5\nweight_normalization: mean",
        ("dynamic_weight",),
        {"weight": "eaft"},
        {"weight": {"alpha": 0.5}},
        "mean",
    ),
    (
        "use_dft_loss: true\ntrain_type: dynamic_mix\ncomponent_name: random\nupdate_step: 2\nupdate_times: 1",
        ("dynamic_mix", "dynamic_weight"),
        {"mix": "random", "weight": "dft"},
        None,
        "tokens",
    ),
    (
        "use_dft_loss: true\ntrain_type: dynamic_weight\ncomponent_name: dft",
        ("dynamic_weight",),
        {"weight": "dft"},
        None,
        "tokens",
    ),
]


@pytest.mark.parametrize(("text", "types", "components", "params", "per"), TOKENS)
def test_keys_for_weighted_token_losses_add_a_weighter(
    tmp_path: Path, text: str, types: object, components: object, params: object, per: str
) -> None:
    cfg = load(tmp_path, text)
    flex = cfg.flex
    assert [flex.train_type, flex.component_name, flex.component_params] == [types, components, params]
    assert flex.weight_normalization == per
    again = load_config(cfg.dump_flat(), quiet=True)
    assert again.flex == flex
    assert load(tmp_path, text, ["use_dft_loss=false", "use_eaft_loss=false"]).flex.component("weight") in (None, "dft")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("use_dft_loss: maybe", "use_dft_loss: expected true or false, got 'maybe'"),
        (
            "use_dft_loss: true\nuse_eaft_loss: true",
            "use_eaft_loss: a run has one weighter of tokens, and use_dft_loss is true too; keep one",
        ),
        (
            "use_eaft_loss: true\ntrain_type: dynamic_weight\ncomponent_name: loss",
            "use_eaft_loss: is the weighter eaft, and component_name is loss; keep one",
        ),
    ],
)
def test_wrong_keys_for_weighted_token_losses(tmp_path: Path, text: str, line: str) -> None:
    assert lines_of(tmp_path, text) == [f"run.yaml:{line}"]


def test_an_alpha_without_its_loss_is_said(tmp_path: Path) -> None:
    (note,) = load(tmp_path, "eaft_alpha: 2").notes
    assert note == f"{tmp_path}/run.yaml:eaft_alpha: not used without use_eaft_loss: true"


INTERLEAVED = "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n"


@pytest.mark.parametrize(
    ("text", "types", "components"),
    [
        (INTERLEAVED, ("dynamic_mix",), None),
        (INTERLEAVED + "train_type: static", ("dynamic_mix",), None),
        (INTERLEAVED + WEIGHT, ("dynamic_weight", "dynamic_mix"), {"weight": "loss"}),
        (INTERLEAVED + "use_dft_loss: true", ("dynamic_weight", "dynamic_mix"), {"weight": "dft"}),
        (INTERLEAVED + MIX.replace("random", "odm"), ("dynamic_mix",), "odm"),
    ],
)
def test_interleaved_datasets_are_a_fixed_mixture(tmp_path: Path, text: str, types: object, components: object) -> None:
    flex = load(tmp_path, text).flex
    assert (flex.train_type, flex.component_name, flex.init_mixture_proportions) == (types, components, (0.7, 0.3))
    assert flex.static_mix is (components != "odm")
    assert load_config(load(tmp_path, text).dump_flat(), quiet=True).flex == flex


def test_keys_of_trackers_are_their_options(tmp_path: Path) -> None:
    text = "use_swanlab: true\nswanlab_project: p\nswanlab_run_name: r\nreport_to: trackio\nproject: q\n"
    output = load(tmp_path, text + "tracker_options: {swanlab: {name: mine}}").output
    assert output.report_to == ("trackio", "swanlab")
    assert output.tracker_options == {"swanlab": {"name": "mine", "project": "p"}, "trackio": {"project": "q"}}
    with pytest.raises(UserError, match="swanlab_api_key: not supported: it is a secret"):
        load(tmp_path, "swanlab_api_key: x")


@pytest.mark.parametrize("key", ["components_cfg_file", "deepspeed"])
def test_a_number_for_a_file_is_a_files_name(key: str) -> None:
    with pytest.raises(UserError, match=f"^config:{key}: '7' does not exist"):
        load_config({"model_name_or_path": "m", "dataset": "a", "output_dir": "out", key: 7}, quiet=True)
