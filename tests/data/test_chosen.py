"""What a config means in a folder of `dataflex-cli select`: datasets without picks, what is held out, what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataflex.config import Config
from dataflex.config.schema import DataSection, FlexSection
from dataflex.config.sections.weighting import WeightingSection
from dataflex.data.chosen import CHOSEN, Chosen, Cost, read_chosen, with_chosen_data
from dataflex.utils.errors import UserError
from dataflex.utils.records import write_sealed
from tests.data.helpers import load, numbered, prompts

COST = Cost(
    selection_seconds=30.0,
    warmup_seconds=10.0,
    samples_scored=100,
    samples_scored_per_second=50.0,
    tokens_scored=900,
    samples_taken_up=7,
    peak_memory_mib=300.0,
    processes=2,
)


@pytest.fixture
def folder(data_dir: Path, add: Any) -> Path:
    """a with 4 rows, b and c without, and 2 rows that were held out of a."""
    add("a", numbered(4))
    for name in ("b", "c"):
        add(name, "", file=f"{name}.jsonl", num_samples=0)
    add("a_held_out", numbered(2, "held "))
    chosen = Chosen(picked={"a": 4, "b": 0, "c": 0}, held_out=["a_held_out"], cost=COST)
    write_sealed(data_dir / CHOSEN, chosen.model_dump())
    return data_dir


def config(folder: Path, *names: str, **data: Any) -> Config:
    return Config(data=DataSection(dataset_dir=str(folder), dataset=names, template="default", **data))


def test_a_dataset_without_picks_is_left_out(folder: Path) -> None:
    cfg = with_chosen_data(config(folder, "b", "a", "c"))
    assert cfg.data.dataset == ("a",) and cfg.data.eval_dataset == ()
    assert prompts(load(cfg).train) == ["0", "1", "2", "3"]
    assert with_chosen_data(cfg) is cfg


def test_without_any_rows_there_is_nothing_to_train_on(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^dataset: no rows, since num_samples is 0 for b, c in .*data$"):
        with_chosen_data(config(folder, "b", "c"))
    with pytest.raises(UserError, match="json:b.num_samples: eval_dataset cannot do without rows, and 0 are drawn$"):
        load(config(folder, "a", eval_dataset=("b",)))


def test_values_by_dataset_are_those_of_the_datasets_that_stay(folder: Path) -> None:
    cfg = config(folder, "b", "a", "c")
    shared = cfg.model_copy(
        update={
            "flex": FlexSection(init_mixture_proportions=(0.0, 1.0, 0.0)),
            "weighting": WeightingSection(domain_weights={"a": 2.0, "b": 3.0}),
        }
    )
    found = with_chosen_data(shared)
    assert found.flex.init_mixture_proportions == (1.0,) and found.weighting.domain_weights == {"a": 2.0}
    wrong = cfg.model_copy(update={"flex": FlexSection(init_mixture_proportions=(0.5, 0.5, 0.0))})
    with pytest.raises(UserError, match=r"init_mixture_proportions: 0.5 for 'b', which has no rows .*; give it 0$"):
        with_chosen_data(wrong)


def test_what_was_held_out_is_held_out_again(folder: Path) -> None:
    cfg = with_chosen_data(config(folder, "a", "b", "c", val_size=0.5))
    data = load(cfg)
    assert (cfg.data.val_size, cfg.data.eval_dataset) == (0.0, ("a_held_out",))
    assert prompts(data.train) == ["0", "1", "2", "3"]
    assert data.eval is not None and prompts(data.eval) == ["held 0", "held 1"]


def test_a_folder_that_is_no_selection_stays_as_it_is(data_dir: Path, add: Any) -> None:
    add("a", numbered(4))
    cfg = config(data_dir, "a", val_size=0.5)
    assert read_chosen(data_dir) is None and with_chosen_data(cfg) is cfg


def test_a_damaged_record_is_one_line(folder: Path) -> None:
    path = folder / CHOSEN
    path.write_text(path.read_text().replace('"a": 4', '"a": 5'))
    with pytest.raises(UserError, match=r"dataflex_selection.json is not as it was written .*; select again$") as error:
        with_chosen_data(config(folder, "a", val_size=0.5))
    assert "\n" not in str(error.value)


def test_costs_add_up() -> None:
    other = Cost(selection_seconds=5.0, samples_scored=300, samples_scored_per_second=100.0, peak_memory_mib=400.0)
    both = COST.plus(other)
    assert both == Cost(
        selection_seconds=35.0,
        warmup_seconds=10.0,
        samples_scored=400,
        samples_scored_per_second=80.0,  # 400 in 2 + 3 s
        tokens_scored=900,
        samples_taken_up=7,
        peak_memory_mib=400.0,
        processes=2,
    )
    assert COST.line == (
        "cost of the selection: 30.0 s, 10.0 of them training that came before; 100 samples, 900 tokens scored, 50.0 "
        "samples/s; processes: 2, memory of one: 300 MiB; 7 samples taken up, their time is not counted"
    )


def test_a_run_adds_the_cost_of_its_data_to_its_own() -> None:
    own = {"train_loss": 1.0, "selection_seconds": 4.0, "samples_scored": 50, "samples_scored_per_second": 25.0}
    assert COST.of_run({}) == {
        "selection_seconds": 30.0,
        "selection_warmup_seconds": 10.0,
        "samples_scored": 100,
        "samples_scored_per_second": 50.0,
    }
    assert COST.of_run(own) == {
        "selection_seconds": 34.0,
        "selection_warmup_seconds": 10.0,
        "samples_scored": 150,
        "samples_scored_per_second": 37.5,  # in 2 + 2 s
    }
