"""What a command makes of its config before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.config import load_config
from dataflex.driver import setup
from dataflex.train.trainer.components import load_components, with_effective_params
from dataflex.utils.errors import UserError
from tests.driver.workspace import settings


@pytest.mark.parametrize(("installed", "used"), [(False, "sdpa"), (True, "fa2")])
def test_without_its_package_fa2_is_sdpa(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], installed: bool, used: str
) -> None:
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: object() if installed else None)
    keys = settings(workspace, model_name_or_path="org/m", flash_attn="fa2")
    assert setup.with_components(load_config(keys, quiet=True)).model.flash_attn == used
    assert capfd.readouterr().err.count("flash_attn: fa2 needs the package flash_attn") == (not installed)


def test_a_decision_may_take_the_whole_pool_and_no_more() -> None:
    keys = {"train_type": "dynamic_select", "component_name": "random", "update_step": 2, "update_times": 1}
    keys |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
    cfg = with_effective_params(load_config(keys, embedded=True))
    load_components(())
    assert [phase.steps for phase in setup._schedule(cfg, 8, 8).phases if phase.decides] == [2]
    with pytest.raises(UserError, match="= 8 samples without replacement, the pool has 7"):
        setup._schedule(cfg, 8, 7)


def test_a_pass_of_the_schedule_has_as_many_samples_as_are_drawn(workspace: Path) -> None:
    drawn = {"sampling": "inverse_domain", "sampling_samples": 10, "max_steps": None, "num_train_epochs": 2}
    cfg = setup.with_components(load_config(settings(workspace, **drawn), quiet=True))
    schedule = setup.read_inputs(cfg).schedule
    assert [phase.steps for phase in schedule.phases] == [5, 5] and schedule.total_steps == 10


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"lora_target": "q_porj"}, r"^lora_target: the model has no 'q_porj' \(did you mean 'q_proj'\?\)"),
        ({"additional_target": "lm_haed"}, r"^additional_target: the model has no 'lm_haed' \(did you mean 'lm_head'"),
    ],
)
def test_a_module_that_the_model_lacks_is_told_before_the_data_is_read(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], text: str
) -> None:
    monkeypatch.setattr(setup, "load_data", lambda *_: pytest.fail("too late"))
    cfg = setup.with_components(load_config(settings(workspace, **keys), quiet=True))
    with pytest.raises(UserError, match=text):
        setup.read_inputs(cfg)


def test_a_param_that_a_component_of_ones_own_does_not_take_is_told_first(workspace: Path) -> None:
    keys = {"train_type": "dynamic_select", "component_name": "repeats", "update_step": 1}
    keys |= {"component_modules": [str(Path(__file__).with_name("own_parts.py"))]}
    cfg = load_config(settings(workspace, **keys, component_params={"select": {"often": 1}}), quiet=True)
    with pytest.raises(UserError, match="^components: selector 'repeats': unknown param 'often'"):
        setup.with_components(cfg)
