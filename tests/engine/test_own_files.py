"""What a user keeps in output_dir is never written over without a word; what a run wrote is known for its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config import load_config
from dataflex.engine.folder import own_files, run_folder, start_over
from dataflex.utils.errors import UserError
from tests.engine.test_manifest import make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def prepared(out: Path, name: str = "run.yaml", **changes: Any) -> Path | None:
    """The checkpoint from `run_folder.prepare`, and `begin`, for a config file called ``name``.

    It lies beside ``out`` unless it is there already.
    """
    path = out.parent / name
    own = {"model_name_or_path": "some/model", "dataset": ["a"], "dataset_dir": str(out.parent), "output_dir": str(out)}
    keys = own | changes
    if not path.exists() or changes:
        path.write_text(yaml.safe_dump(keys))
    cfg = load_config(path, quiet=True)
    start = run_folder.prepare(cfg)
    run_folder.begin(cfg, start)
    return start.checkpoint


@pytest.mark.parametrize("name", ["README.md", "config.json", "config.yaml", "model.safetensors", "tokenizer.json"])
def test_a_file_of_the_users_is_in_the_way_of_a_new_run(out: Path, name: str) -> None:
    (out / name).write_text("mine")
    with pytest.raises(
        UserError, match=rf"output_dir: {out} holds {name}, which no run has written and this one would "
    ):
        prepared(out)
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_overwrite_output_dir_renames_it(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "README.md.before", "notes.txt", "config.yaml"):
        (out / name).write_text(f"my {name}")
    prepared(out, overwrite_output_dir=True)
    names = {"README.md.before", "README.md.before2", "notes.txt", "config.yaml.before", "config.yaml"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "README.md.before2").read_text() == "my README.md"
    assert f"{out}/README.md: not written by a run; kept as README.md.before2" in capfd.readouterr().err
    assert yaml.safe_load((out / "config.yaml").read_text())["dataset"] == ["a"]


@pytest.mark.parametrize("over", [True, False])
def test_the_yaml_that_is_run_is_never_written_over(out: Path, over: bool) -> None:
    with pytest.raises(UserError, match="config.yaml is the config file of this run.*give the file another name"):
        prepared(out, "out/config.yaml", overwrite_output_dir=over)
    assert set(yaml.safe_load((out / "config.yaml").read_text())) >= {"dataset", "output_dir"}
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_the_config_that_a_run_wrote_can_be_run_until_it_is_changed(out: Path) -> None:
    prepared(out)
    written = (out / "config.yaml").read_text()
    prepared(out, "out/config.yaml")
    assert (out / "config.yaml").read_text() == written
    (out / "config.yaml").write_text(written + "# my own words\n")
    with pytest.raises(UserError, match="is the config file of this run"):
        prepared(out, "out/config.yaml")


def test_a_readme_that_came_while_training_is_kept(out: Path) -> None:
    own_files.write(out / "README.md", "# card\n")
    own_files.write(out / "README.md", "# a later card\n")
    assert [path.name for path in out.iterdir()] == ["README.md"]
    (out / "README.md").write_text((out / "README.md").read_text().replace("card", "model"))
    own_files.write(out / "README.md", "# the last card\n")
    assert (out / "README.md.before").read_text().startswith("# a later model\n")
    assert (out / "README.md").read_text().startswith("# the last card\n")


def test_the_same_command_starts_over_and_numbers_the_logs(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        prepared(out)
        (out / "trainer_log.jsonl").write_text(f"start {number}")
        (out / "decisions").mkdir(exist_ok=True)
        (out / "decisions/step_1.json").write_text(str(number))
        (out / "checkpoint-4").mkdir()  # a save that did not finish
    prepared(out, logging_steps=3, save_steps=7, resume_from_checkpoint="auto")
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "trainer_log.1.jsonl",
        "trainer_log.2.jsonl",
        "decisions.1",
        "decisions.2",
    }
    assert (out / "trainer_log.2.jsonl").read_text() == "start 2"
    assert (out / "decisions.1/step_1.json").read_text() == "1"
    said = capfd.readouterr().err
    assert (
        "an earlier start of this run left no whole checkpoint; starting over; its logs are kept as decisions.1" in said
    )


@pytest.mark.parametrize(
    ("file", "keys", "why"),
    [
        ("trainer_log.jsonl", {"learning_rate": 0.5}, r"has another learning_rate \(5e-05, here 0.5\)"),
        ("trainer_log.jsonl", {"seed": 1, "dataset": ["b"]}, "has another dataset"),
        (
            "trainer_log.jsonl",
            {"per_device_train_batch_size": 4},
            r"has another per_device_train_batch_size \(8, here 4\)",
        ),
        ("trainer_log.jsonl", {"seed": 1}, r"has another seed \(42, here 1\)"),
        ("all_results.json", {}, "has results"),
        ("model-00001-of-00002.safetensors", {}, "has exported weights"),
        ("checkpoint-3/adapter_model.safetensors", {}, "has exported weights"),
    ],
)
def test_another_run_or_one_with_results_is_not_started_over(
    out: Path, file: str, keys: dict[str, Any], why: str
) -> None:
    prepared(out)
    (out / "trainer_log.jsonl").write_text("1")
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("1")
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=f"has no whole checkpoint to go on from and {why}.*; name another folder"):
        prepared(out, **keys)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    "content", [b"", b"a: [", b"\xff\xfe\xff", b"- a", b"!!python/object:os.system {}", b"[" * 3000]
)
def test_an_earlier_runs_damaged_config_is_one_line(out: Path, content: bytes) -> None:
    """Of a run that left no checkpoint: what it was made with is not known."""
    prepared(out)
    (out / "trainer_log.jsonl").write_text("1")
    (out / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"^output_dir: {out} holds an earlier run [^\n]+; name another folder"):
        prepared(out)
    assert (out / "config.yaml").read_bytes() == content


def test_what_a_component_keeps_in_cache_is_left_alone(out: Path) -> None:
    """Also where a run starts over; so are the scores and features, which know for themselves what they are of."""
    prepared(out)
    for name in ("cache/mine", "scores/0/manifest.json", "features/0/manifest.json"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("kept")
    (out / "all_results.json").write_text("{}")
    prepared(out, overwrite_output_dir=True)
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert kept == {"config.yaml", "cache/mine", "scores/0/manifest.json", "features/0/manifest.json"}


def test_a_run_is_started_over_on_another_number_of_processes(out: Path) -> None:
    """8 a process on 3 of them has the global batch of 2 x 12 on one."""
    prepared(out)
    (out / "trainer_log.jsonl").write_text("1")
    prepared(out, per_device_train_batch_size=2, gradient_accumulation_steps=12)
    assert (out / "trainer_log.1.jsonl").exists()


def test_a_damaged_checkpoint_is_kept_under_another_name(out: Path) -> None:
    prepared(out)
    (out / "checkpoint-4").mkdir()
    (out / "checkpoint-4/dataflex_manifest.json").write_text("{")
    prepared(out)
    assert (out / "damaged-checkpoint-4/dataflex_manifest.json").exists()


def test_true_wants_a_checkpoint_and_auto_does_not(out: Path) -> None:
    with pytest.raises(UserError, match="there is no whole checkpoint in .*; auto starts the run where there is none"):
        prepared(out, resume_from_checkpoint=True)
    assert prepared(out, resume_from_checkpoint="auto") is None
    assert start_over.obstacle(load_config(out.parent / "run.yaml", quiet=True), out) is None


def test_as_many_damaged_checkpoints_of_one_step_are_kept_as_there_are(out: Path) -> None:
    for number in range(3):
        prepared(out)
        (out / "checkpoint-4").mkdir()
        (out / "checkpoint-4/dataflex_manifest.json").write_text(str(number))
    prepared(out)
    names = ("damaged-checkpoint-4", "damaged-checkpoint-4.2", "damaged-checkpoint-4.3")
    assert [(out / name / "dataflex_manifest.json").read_text() for name in names] == ["0", "1", "2"]


def test_a_start_that_ended_while_it_renamed_logs_is_started_over(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(out)
    for name in ("trainer_log.jsonl", "trainer_state.json", "odm_weights.jsonl"):
        (out / name).write_text("1")
    rename, left = Path.rename, iter((True, True, False))

    def until_killed(path: Path, target: Path) -> Path:
        if not next(left):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", until_killed)
        prepared(out)
    assert prepared(out) is None
    logs = {"trainer_log.1.jsonl", "trainer_state.1.json", "odm_weights.1.jsonl"}
    assert {path.name for path in out.iterdir()} == {"config.yaml", *logs}


def test_a_readme_that_was_changed_is_kept_when_the_run_is_started_over(out: Path) -> None:
    prepared(out)
    (out / "all_results.json").write_text("{}")
    own_files.write(out / "README.md", "# card\n")
    (out / "README.md").write_text("# my own words\n")
    prepared(out, overwrite_output_dir=True)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "README.md.before"}
    assert (out / "README.md.before").read_text() == "# my own words\n"


def test_nothing_of_an_earlier_run_goes_before_the_inputs_are_read(out: Path) -> None:
    """A mistake in the data's or the model's name must not cost what is there."""
    prepared(out)
    for name in ("trainer_log.jsonl", "all_results.json", "model.safetensors", "README.md"):
        (out / name).write_text("1")
    before = sorted(out.iterdir())
    keys = yaml.safe_load((out.parent / "run.yaml").read_text())
    for resume in (None, "auto"):
        (out.parent / "over.yaml").write_text(
            yaml.safe_dump(keys | {"overwrite_output_dir": True, "resume_from_checkpoint": resume})
        )
        cfg = load_config(out.parent / "over.yaml", quiet=True)
        start = run_folder.prepare(cfg)
        assert start == run_folder.Start(None, "clear") and sorted(out.iterdir()) == before
    run_folder.begin(cfg, start)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "README.md.before"}


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keys of a run that goes on from another run's checkpoint, as the same command gives them each time."""
    start = tmp_path / "home/checkpoint-2"
    make(start, 2)
    make(tmp_path / "other/checkpoint-2", 2)
    monkeypatch.setattr(run_folder, "_fitting", lambda cfg, start: start)
    return {"resume_from_checkpoint": str(start)}


def test_a_forks_same_command_goes_on_from_its_own_checkpoint(out: Path, fork: dict[str, Any]) -> None:
    assert prepared(out, **fork) == out.parent / "home/checkpoint-2"
    run_folder.write_config(load_config(out.parent / "run.yaml", quiet=True))  # as a run does once it is loaded
    (out / "trainer_log.jsonl").write_text("1")
    assert prepared(out) == out.parent / "home/checkpoint-2"
    assert (out / "trainer_log.1.jsonl").read_text() == "1"
    make(out / "checkpoint-3", 3)
    assert prepared(out) == out / "checkpoint-3" and (out / "checkpoint-3").is_dir()
    with pytest.raises(UserError, match="checkpoint-3 would be written again; name another output_dir, or drop it"):
        prepared(out, resume_from_checkpoint=str(out.parent / "other/checkpoint-2"))
    assert prepared(out, **fork, overwrite_output_dir=True) == out.parent / "home/checkpoint-2"
    assert not (out / "checkpoint-3").exists()


def test_a_fork_into_another_runs_folder_is_refused(out: Path, fork: dict[str, Any]) -> None:
    prepared(out)
    (out / "all_results.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"all_results.json would be written again; name another output_dir, or drop it"
    ):
        prepared(out, **fork)
    assert (out / "all_results.json").exists()
