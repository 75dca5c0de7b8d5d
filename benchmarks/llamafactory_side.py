"""LLaMA-Factory's own token ids and labels of a case, by its functions; and what it does otherwise on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from llamafactory_cases import ENTRIES, THOUGHT_CALL, Case, ours
from llamafactory_train import without_torchaudio

from dataflex.data.encoding.encode import IGNORE_INDEX
from dataflex.data.encoding.formats import Format, find_format

Ids = tuple[list[int], list[int]]
DATE = "26 Jul 2024"


def load() -> Any:
    """LLaMA-Factory's package of data, without the media libraries that it imports. SystemExit where it is missing."""
    without_torchaudio()
    try:
        import llamafactory.data
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"LLaMA-Factory is needed beside dataflex ({error}): pip install --no-deps llamafactory==0.9.5"
        ) from None
    return llamafactory.data


def theirs(name: str, case: Case, tokenizer: Any, plain: bool = False) -> Ids:
    """input_ids and labels of a case. plain: without what dataflex leaves out on purpose (`REASONS`)."""
    data = load()
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor import SupervisedDatasetProcessor

    args = {"template": name, "cutoff_len": 4096, "train_on_prompt": False, "mask_history": False, "tool_format": None}
    args |= {"default_system": None, "enable_thinking": True, "preserve_thinking": False, **case.settings}
    data_args = SimpleNamespace(**args)
    attr = DatasetAttr("file", dataset_name="x")
    attr.join(ENTRIES[case.entry])
    example = get_dataset_converter(attr.formatting, attr, data_args)(case.row)
    if plain:
        example = _plain(example, case, find_format(name))
    template = data.get_template_and_fix_tokenizer(tokenizer, data_args)
    template.mm_plugin = get_mm_plugin(name="base")
    processor = SupervisedDatasetProcessor(template, tokenizer, None, data_args)
    with _date(plain):
        out = processor.preprocess_dataset({key: [value] for key, value in example.items()})
    ids, labels = out["input_ids"][0], out["labels"][0]
    if plain and template.efficient_eos and args["mask_history"]:
        labels = [
            label if label in (token, IGNORE_INDEX) else IGNORE_INDEX for token, label in zip(ids, labels, strict=True)
        ]
    return ids, labels


@contextlib.contextmanager
def _date(fixed: bool) -> Iterator[None]:
    from llamafactory.data import tool_utils

    now = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda form: DATE))
    with mock.patch.object(tool_utils, "datetime", now) if fixed else contextlib.nullcontext():
        yield


def _plain(example: dict[str, Any], case: Case, fmt: Format) -> dict[str, Any]:
    """A converted row without what its converter adds."""
    example = dict(example)
    if case.entry == "openai":
        example["_system"] = case.row.get("rules", "")
        between = "\n</tool_response>\n<tool_response>\n"
        example["_prompt"] = [
            {**m, "content": m["content"].replace(between, fmt.between_results)} if m["role"] == "observation" else m
            for m in example["_prompt"]
        ]
    if example["_tools"] == "[]":
        example["_tools"] = ""
    return example


@dataclass(frozen=True)
class Reason:
    """Why ids or labels differ on purpose; ``applies`` to a format in a case."""

    text: str
    applies: Callable[[str, Format, Case], bool]


def _says_tools(case: Case) -> bool:
    return case.row.get("tools") not in (None, "", "[]")


REASONS: dict[str, Reason] = {
    "a": Reason(
        "what stands between the end-of-turn token and the next turn (a newline) is not trained, and does not stand "
        "after the last answer: generation has ended before it",
        lambda name, fmt, case: bool(fmt.after),
    ),
    "b": Reason(
        "a system text of the data is followed by an empty line, as alpaca's own is; there it runs into the question",
        lambda name, fmt, case: name == "alpaca" and bool(case.row.get("rules")),
    ),
    "c": Reason(
        f"the date beside descriptions of tools is {DATE}, that of the model's own chat template; there it is that "
        "of the run, so that tokens change with the day",
        lambda name, fmt, case: "Today Date" in fmt.tools.described and _says_tools(case),
    ),
    "d": Reason(
        'rows of `"formatting": "openai"` get the system text that they have; there "detailed thinking off" or '
        "a newline is added to it",
        lambda name, fmt, case: case.entry == "openai",
    ),
    "e": Reason(
        "several results of tools are joined by a newline; there by Qwen's marks (`</tool_response>`) in any template",
        lambda name, fmt, case: case.entry == "openai" and "tool_response" not in fmt.between_results,
    ),
    "f": Reason(
        "with mask_history the last answer alone is trained; there the end of earlier ones is, too",
        lambda name, fmt, case: fmt.ends_with_eos and bool(case.settings.get("mask_history")),
    ),
    "g": Reason(
        "an empty list of tools is no tools; there it makes an empty system turn",
        lambda name, fmt, case: case.row.get("tools") == "[]",
    ),
    "h": Reason(
        "a thought before a call stays before it; there such a row ends the run where the template knows other "
        "thoughts, or has its system text in the question",
        lambda name, fmt, case: (
            case is THOUGHT_CALL and (fmt.system_in_user or bool(fmt.thought) and "<think>" not in fmt.empty_thought)
        ),
    ),
}


def as_theirs(name: str) -> Format:
    """The format with what follows an answer trained (a), and alpaca's system text as it is there (b)."""
    fmt = find_format(name)
    if name == "alpaca":
        fmt = replace(fmt, system="{content}", default_system=f"{fmt.default_system}\n\n")
    call = (fmt.call or fmt.answer) + fmt.after
    return replace(fmt, answer=fmt.answer + fmt.after, call=call, after="")


def compared(name: str, case: Case, make: Callable[[], Any]) -> str:
    """ "=", the letters of `REASONS`, "refused" where both refuse it, or "DIFFERENT"."""
    fmt = find_format(name)
    found: list[Ids | None] = []
    for side in (lambda: theirs(name, case, make()), lambda: ours(name, case, make())):
        try:
            found.append(side())
        except (ValueError, RuntimeError):
            found.append(None)
    if found == [None, None]:
        return "refused"
    if found[0] is not None and found[0] == found[1]:
        return "="
    letters = "".join(letter for letter, reason in REASONS.items() if reason.applies(name, fmt, case))
    if found[0] is None and "h" in letters:
        return "h"
    if not letters or None in found:
        return "DIFFERENT"
    same = theirs(name, case, make(), plain=True) == ours(as_theirs(name), case, make())
    return letters if same else "DIFFERENT"


def packed(ids: list[int], labels: list[int]) -> dict[str, Any]:
    """ids, the [first, end) places whose labels are their ids, and {place: label} of other labels."""
    own = [i for i, (token, label) in enumerate(zip(ids, labels, strict=True)) if token == label]
    starts = [i for i in own if i - 1 not in own]
    spans = [[i, next(j for j in range(i, len(ids) + 1) if j not in own)] for i in starts]
    other = {str(i): label for i, label in enumerate(labels) if label not in (ids[i], IGNORE_INDEX)}
    return {"ids": ids, "trained": spans} | ({"other": other} if other else {})


def labels_of(kept: dict[str, Any]) -> list[int]:
    """The labels of what `packed` made."""
    labels = [IGNORE_INDEX] * len(kept["ids"])
    for first, end in kept["trained"]:
        labels[first:end] = kept["ids"][first:end]
    for place, label in kept.get("other", {}).items():
        labels[int(place)] = label
    return labels
