"""The page of the docs that `families.py` writes from its rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

HOW = ("lora", "full")
HEAD = """# Families of models

{families} families of causal language models of transformers, each from a tiny config with random weights: the
gradients that `less` scores with, of a padded batch of five samples of unequal lengths, against single-sample float64
autograd of every trained parameter; then one training step. Dropout, biases, ties and activation functions are as the
family's config has them; activation checkpointing is on.

*exact* is followed by the largest relative error of a sample's gradient of a parameter (of that, or of a thousandth
of the sample's whole gradient where it is smaller). *refused*: the run ends with this one line before it trains. *not
covered*: it trains, and `less` ends with this line; `layers` can leave the named parameters out, and the other
selectors need no gradients. *no truth*: the family's own code does not run in float64, so there is nothing to compare
with. {said}. All rows are of one run.

Exact means at most 1e-3, the tolerance of `dataflex-cli check` in float32. Where a family picks keys by an indexer, its
`index_topk` is above the samples' length.

`{command} --csv FILE --table docs/families.md` ({machine})
"""


def table(rows: list[dict[str, Any]], command: str, machine: str) -> str:
    """The page of the docs."""
    by_family: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_family.setdefault(row["family"], {})[row["finetuning"]] = row
    counts = {how: Counter(found[how]["result"] for found in by_family.values() if how in found) for how in HOW}
    said = "; ".join(f"{how}: " + ", ".join(f"{n} {what}" for what, n in counts[how].most_common()) for how in HOW)
    lines = [*HEAD.format(families=len(by_family), said=said, command=command, machine=machine).splitlines(), ""]
    lines += ["| family | LoRA | full | why not, or what of it |", "| --- | --- | --- | --- |"]
    for family in sorted(by_family):
        found = by_family[family]
        cells = [f"{r['result']} {r.get('error', '')}".strip() if (r := found.get(how)) else "" for how in HOW]
        why = {how: _note(found[how]) for how in HOW if how in found}
        texts = [why[how] for how in HOW if why.get(how)]
        same = len(set(texts)) < len(texts)
        note = texts[0] if same else "; ".join(f"{how}: {text}" for how, text in why.items() if text)
        lines.append(f"| {family} | {cells[0]} | {cells[1]} | {note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _note(row: dict[str, Any]) -> str:
    return str(row.get("detail", "")).replace("gradient features: ", "").strip("; ")
