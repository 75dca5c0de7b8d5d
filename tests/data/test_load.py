"""load_data: counting, choosing, splitting; and the real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataflex.config import Config
from dataflex.data.load import load_data, load_pool
from dataflex.utils.errors import UserError
from tests.data.conftest import ROWS
from tests.data.helpers import load, numbered, prompts
from tests.tiny import byte_tokenizer

Add = Callable[..., Path]
MakeConfig = Callable[..., Config]
SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not there")


def test_domains_lengths_and_report(add: Add, config: MakeConfig) -> None:
    add("a", ROWS)
    add("b", [*numbered(3, "b"), {"instruction": "b0", "output": "0"}])
    out = load(config("a", "b"))
    assert out.train.domain_names == ["a", "b"]
    assert out.train.domain_ids.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert out.train.lengths.tolist() == [len(out.train[i]["input_ids"]) for i in range(7)]
    assert set(out.train[0]) == {"input_ids", "labels"}
    assert out.eval is None
    first, second = out.report.train
    assert (first.read, first.samples, first.duplicates) == (3, 3, 0)
    assert (second.read, second.samples, second.duplicates) == (4, 4, 1)
    assert first.tokens == out.train.lengths[:3].sum()
    assert out.report.lines()[-1] == "  1 duplicates (kept)"


def test_unusable_rows_are_counted_aloud(add: Add, config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "q", "output": None}] * 5 + numbered(2)
    add("x", rows)
    for _ in range(2):
        out = load(config("x"))
        assert out.report.train[0].dropped == {"no answer": (5, ["x.json:1", "x.json:2", "x.json:3"])}
        assert prompts(out.train) == ["0", "1"]
        assert "x: 5 of 7 rows dropped: 5 no answer (x.json:1" in capsys.readouterr().err
        assert "  5 dropped: no answer (x.json:1, x.json:2, x.json:3, ...)" in out.report.lines()


def test_a_dataset_without_usable_rows_is_refused(add: Add, config: MakeConfig) -> None:
    add("x", [{"conversations": [{"from": "user", "value": "a"}]}], formatting="sharegpt")
    with pytest.raises(UserError, match=r"x: none of its 1 rows can be used: 1 unknown role 'user'"):
        load(config("x"))


def test_truncated_and_masked_samples(add: Add, config: MakeConfig) -> None:
    add("x", [{"instruction": "q" * 100, "output": "a"}, {"instruction": "q", "output": "a" * 100}])
    out = load(config("x", cutoff_len=20))
    report = out.report.train[0]
    assert (report.truncated, report.all_masked) == (2, 0)
    assert out.train.lengths.tolist() == [19, 20], "the first keeps its answer and room for the newline after it"
    trained = sum(label >= 0 for sample in (out.train[0], out.train[1]) for label in sample["labels"])
    assert (report.tokens, report.trained_tokens) == (39, trained) and 0 < trained < 39
    add("y", [{"instruction": "q" * 90, "output": "a" * 9}, {"instruction": "", "output": "a" * 20}])
    out = load(config("y", cutoff_len=8, template="empty"))
    assert (out.report.train[0].all_masked, len(out.train)) == (1, 1)
    assert "1 without a trained token (dropped)" in "\n".join(out.report.lines())
    add("z", [{"instruction": "q" * 90, "output": "a" * 9}])
    with pytest.raises(UserError, match="z: all 1 samples are masked: .* within cutoff_len 8"):
        load(config("z", cutoff_len=8, template="empty"))


def test_max_samples_and_num_samples(add: Add, config: MakeConfig) -> None:
    add("x", numbered(40), num_samples=10)
    drawn = prompts(load(config("x")).train)
    assert len(set(drawn)) == 10 and drawn == sorted(drawn, key=int) and drawn != [str(i) for i in range(10)]
    assert prompts(load(config("x")).train) == drawn
    assert prompts(load(config("x", seed=2)).train) != drawn
    out = load(config("x", max_samples=4))
    assert prompts(out.train) == drawn[:4]
    assert out.report.train[0].not_chosen == 36
    add("y", numbered(3), num_samples=5)
    assert set(prompts(load(config("y")).train)) == {"0", "1", "2"} and len(load(config("y")).train) == 5


@pytest.mark.parametrize(
    ("val_size", "sizes"), [(0.1, (3, 9)), (12, (3, 9)), (0.5, (15, 45)), (7, (2, 5)), (0.01, (1, 1))]
)
def test_val_size_is_stratified_and_disjoint(
    add: Add, config: MakeConfig, val_size: float, sizes: tuple[int, int]
) -> None:
    add("a", numbered(30, "a"))
    add("b", numbered(90, "b"))
    out = load(config("a", "b", val_size=val_size))
    assert out.eval is not None
    assert out.eval.domain_names == ["a", "b"]
    assert tuple(out.eval.domain_sizes()) == sizes
    train, held = prompts(out.train), prompts(out.eval)
    assert not set(train) & set(held) and len(train) + len(held) == 120 == len(set(train + held))
    assert out.eval.lengths.tolist() == [len(out.eval[i]["input_ids"]) for i in range(len(held))]
    assert [name[0] for name in train] == [out.train.domain_names[d] for d in out.train.domain_ids]
    again = load(config("a", "b", val_size=val_size))
    assert again.eval is not None and prompts(again.eval) == held
    assert (again.train.fingerprint, again.eval.fingerprint) == (out.train.fingerprint, out.eval.fingerprint)
    other = load(config("a", "b", val_size=val_size, seed=3))
    assert other.eval is not None and prompts(other.eval) != held
    assert out.report.held_out == sum(sizes)


def test_held_out_samples_take_their_weights_rows_and_files_along(add: Add, config: MakeConfig) -> None:
    for name in ("a", "b"):
        add(name, [row | {"w": float(row["output"]) + 1} for row in numbered(20)])
    out = load(config("a", "b", val_size=8, sample_weight="w"))
    assert out.eval is not None
    for pool in (out.train, out.eval):
        numbers = [int(prompt) for prompt in prompts(pool)]
        assert pool.sample_weights is not None and pool.sample_weights.tolist() == [n + 1.0 for n in numbers]
        named = [pool.domain_names[d] for d in pool.domain_ids]
        assert [pool.whence(i) for i in range(len(pool))] == [
            f"{name}.json:{n + 1}" for name, n in zip(named, numbers, strict=True)
        ]
    assert out.train.fingerprint != out.eval.fingerprint


def test_weights_and_rows_stay_with_their_samples_where_masked_ones_go(add: Add, config: MakeConfig) -> None:
    rows = numbered(6)
    for masked in (1, 4):
        rows[masked] = {"instruction": "q" * 90, "output": "a" * 9}
    add("a", [row | {"w": i + 1.0} for i, row in enumerate(rows)])
    pool = load(config("a", sample_weight="w", cutoff_len=8, template="empty")).train
    kept = [i for i in range(6) if i not in (1, 4)]
    assert pool.sample_weights is not None and pool.sample_weights.tolist() == [i + 1.0 for i in kept]
    assert [pool.whence(i) for i in range(len(pool))] == [f"a.json:{i + 1}" for i in kept]


def test_val_size_that_cannot_be(add: Add, config: MakeConfig) -> None:
    add("a", numbered(3))
    add("b", numbered(1))
    for val_size in (0.99, 3):
        with pytest.raises(UserError, match="val_size: .* both sides need at least one"):
            load(config("a", val_size=val_size))
    with pytest.raises(UserError, match="val_size: 3 leaves no sample of 'b' to train on"):
        load(config("a", "b", val_size=3))
    with pytest.raises(UserError, match="val_size: cannot be used together with eval_dataset"):
        load(config("a", val_size=0.5, eval_dataset=("b",)))


def test_eval_datasets_are_domains_and_shared_rows_are_said(add: Add, config: MakeConfig) -> None:
    add("a", numbered(5))
    add("b", numbered(2, "b"))
    add("c", numbered(7))
    out = load(config("a", eval_dataset=("b", "c")))
    assert out.eval is not None
    assert out.eval.domain_names == ["b", "c"]
    assert out.report.shared_rows == 5
    assert "note: 5 evaluation samples are also in the training data" in out.report.lines()
    pool = load_pool(config("a"), byte_tokenizer(), ["b", "c"], "mixer_eval_dataset")
    assert pool.fingerprint == out.eval.fingerprint
    with pytest.raises(UserError, match="mixer_eval_dataset: names no dataset"):
        load_pool(config("a"), byte_tokenizer(), [], "mixer_eval_dataset")


def test_sample_weights(add: Add, config: MakeConfig) -> None:
    add("x", [row | {"w": i / 2} for i, row in enumerate(numbered(3))])
    out = load(config("x", sample_weight="w"))
    assert out.train.sample_weights is not None and out.train.sample_weights.tolist() == [0.0, 0.5, 1.0]
    add("y", numbered(2))
    with pytest.raises(UserError, match=r"y.json:1: no column 'w' \(sample_weight\)"):
        load(config("x", "y", sample_weight="w"))
    add("t", [{"text": "a", "w": 1.0}], columns={"prompt": "text"})
    with pytest.raises(UserError, match="sample_weight: a packed block of stage pt has no one weight"):
        load(config("t", stage="pt", sample_weight="w"))


def test_weights_are_of_training_and_not_of_the_evaluation(add: Add, config: MakeConfig) -> None:
    add("x", [row | {"w": 2.0} for row in numbered(3)])
    add("plain", numbered(2))
    out = load(config("x", eval_dataset=("plain",), sample_weight="w"))
    assert out.train.sample_weights is not None and out.eval is not None
    assert out.eval.sample_weights is None


def test_the_evaluation_samples_keep_a_column(add: Add, config: MakeConfig) -> None:
    add("x", numbered(3))
    add("target", [row | {"task": i % 2} for i, row in enumerate(numbered(4))])
    out = load_data(config("x", eval_dataset=("target",)), byte_tokenizer(), "task")
    assert out.eval is not None and [out.eval[i]["task"] for i in range(4)] == ["0", "1", "0", "1"]
    assert set(out.train[0]) == {"input_ids", "labels"}
    with pytest.raises(UserError, match=r"no column 'tsk' \(subtask_column\) \(did you mean 'task'\?\)"):
        load_data(config("x", eval_dataset=("target",)), byte_tokenizer(), "tsk")
    streamed = load_data(config("x", eval_dataset=("target",), streaming=True), byte_tokenizer(), "task")
    assert streamed.eval is not None and streamed.eval[3]["task"] == "1"


def test_a_part_held_out_brings_the_column_and_the_rest_may_lack_it(add: Add, config: MakeConfig) -> None:
    add("target", [row | {"task": i % 2} for i, row in enumerate(numbered(4))])
    held = load_data(config("target", val_size=2), byte_tokenizer(), "task").eval
    assert held is not None and held.rows is not None
    assert [held[i]["task"] for i in range(2)] == [str(row % 2) for row in held.rows]
    for missing in held.rows.tolist(), sorted({0, 1, 2, 3} - set(held.rows.tolist())):
        add("some", [row | {"tsk" if i in missing else "task": "t"} for i, row in enumerate(numbered(4))])
        if missing != held.rows.tolist():
            some = load_data(config("some", val_size=2), byte_tokenizer(), "task").eval
            assert some is not None and [some[i]["task"] for i in range(2)] == ["t", "t"]
            continue
        with pytest.raises(UserError) as caught:
            load_data(config("some", val_size=2), byte_tokenizer(), "task")
        assert str(caught.value) == (
            f"some.json:{missing[0] + 1}: no 'task' (subtask_column) (did you mean 'tsk'?), and val_size holds this "
            "row out to evaluate on; it has instruction, output, tsk; give all rows of its dataset one, or set "
            "eval_dataset instead"
        )


def test_what_alone_is_evaluated_brings_the_column(add: Add, config: MakeConfig) -> None:
    """As `dataflex-cli eval` reads its data."""
    add("target", [row | {"task": i % 2} for i, row in enumerate(numbered(4))])
    pool = load_data(config("target"), byte_tokenizer(), "task").train
    assert [pool[i]["task"] for i in range(4)] == ["0", "1", "0", "1"]
    add("plain", numbered(2))
    with pytest.raises(UserError, match=r"plain.json:1: no column 'task' \(subtask_column\)"):
        load_data(config("plain"), byte_tokenizer(), "task")


TEXTS = [{"text": "abc"}, {"text": "defgh"}, {"text": "i"}]


@pytest.mark.parametrize("cutoff", [4, 5, 100])
def test_pt_packs_documents_into_blocks(add: Add, config: MakeConfig, cutoff: int) -> None:
    add("t", TEXTS, columns={"prompt": "text"})
    out = load(config("t", stage="pt", cutoff_len=cutoff, template=None))
    stream = byte_tokenizer()("abc</s>defgh</s>i</s>")["input_ids"]
    blocks = [stream[i : i + cutoff] for i in range(0, len(stream), cutoff)]
    assert [out.train[i]["input_ids"] for i in range(len(out.train))] == blocks
    assert [out.train[i]["labels"] for i in range(len(out.train))] == blocks
    assert out.train.lengths.tolist() == [len(block) for block in blocks]


def test_pt_without_packing_has_a_document_a_sample(add: Add, config: MakeConfig) -> None:
    add("t", TEXTS, columns={"prompt": "text"})
    out = load(config("t", stage="pt", cutoff_len=5, packing=False))
    texts = [byte_tokenizer().decode(out.train[i]["input_ids"]) for i in range(3)]
    assert texts == ["abc</s>", "defgh", "i</s>"]
    assert out.report.train[0].truncated == 1
    whole = load(config("t", stage="pt", cutoff_len=6, packing=False))
    assert whole.train.lengths.tolist() == [4, 6, 2] and whole.report.train[0].truncated == 0, "six fit into six"


def test_pt_does_not_join_domains_and_needs_an_end_token(add: Add, config: MakeConfig) -> None:
    add("t", TEXTS, columns={"prompt": "text"})
    add("u", TEXTS, columns={"prompt": "text"})
    out = load(config("t", "u", stage="pt", cutoff_len=8))
    assert out.train.domain_ids.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="stage pt ends each document with the tokenizer's eos token"):
        load_data(config("t", stage="pt"), byte_tokenizer(eos=False))


@needs_real_data
def test_real_data(config: MakeConfig) -> None:
    names = ("alpaca_en_demo", "gsm8k_train")
    out = load(config(*names, eval_dataset=("gsm8k_val",), dataset_dir=str(SHARED)))
    assert out.train.domain_sizes().tolist() == [999, 1000]
    assert out.eval is not None and len(out.eval) == 100
    assert out.report.shared_rows == 0
    assert all(not report.dropped and report.all_masked == 0 for report in out.report.train)
    labels = np.array(out.train[1500]["labels"])
    assert (labels[labels != -100] == np.array(out.train[1500]["input_ids"])[labels != -100]).all()


@needs_real_data
def test_real_text(config: MakeConfig) -> None:
    out = load(config("c4_demo", "wiki_demo", stage="pt", cutoff_len=1024, dataset_dir=str(SHARED)))
    assert [report.read for report in out.report.train] == [300, 30]
    assert (out.train.lengths == 1024).sum() >= len(out.train) - 2
    eos = sum(out.train[i]["input_ids"].count(2) for i in range(len(out.train)))
    assert eos == 330
