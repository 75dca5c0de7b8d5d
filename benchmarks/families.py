"""Which families of transformers are scored exactly: tiny configs, LoRA on every linear layer, and full finetuning.

For each, the gradients of the samples of a padded batch of unequal lengths, rebuilt from the taps in float32,
against single-sample float64 autograd, parameter by parameter; then one training step. Dropout, biases and ties
are as the family's config has them. Each family runs in a process of its own, so that a crash is seen.

    python benchmarks/families.py --csv results/families.csv --table ../docs/families.md
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import time
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families_setup import VOCABULARY, families, tiny_config
from families_table import HOW, table
from less_setup import engine_for, write_csv
from measure import machine
from process_group import end_process, start_process
from torch import Tensor, nn

TOLERANCE = 1e-3  # what dataflex-cli check asks of float32
LIMIT_S = 300
SHOWN = ("family", "finetuning", "result", "error", "detail", "loss", "moved", "trained", "seconds")


class GradientSink:
    """Keeps every sample's whole gradient: ``found`` {name: [S, *shape]}; for tiny models only."""

    per_sample = True

    def __init__(self, module: nn.Module) -> None:
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        self.found: dict[str, Tensor] = {}
        self.scale = 1.0

    def start(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens

    def finish(self) -> None:
        """Nothing waits."""

    def at_hand(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return nullcontext()

    def _sample_of(self, rows: int) -> Tensor:
        spans = self.cu_seqlens.diff() * (rows // int(self.cu_seqlens[-1]))
        return torch.arange(len(spans)).repeat_interleave(spans)

    def _add(self, name: str, sample: int, grad: Tensor) -> None:
        total = self.found.setdefault(name, torch.zeros(len(self.cu_seqlens) - 1, *self.shapes[name]))
        total[sample] += grad.reshape(self.shapes[name])

    def sample(self, name: str, sample: int, grad: Tensor) -> None:
        self._add(name, sample, grad)

    def outer(self, name: str, row: Tensor, col: Tensor, per_token: int = 1) -> None:
        of = self._sample_of(len(row))
        for sample in of.unique().tolist():
            self._add(name, sample, row[of == sample].T @ col[of == sample])

    def dense(self, name: str, per_token: Tensor) -> None:
        of = self._sample_of(len(per_token))
        for sample in of.unique().tolist():
            self._add(name, sample, per_token[of == sample].sum(0))

    def rows(self, name: str, row_ids: Tensor, values: Tensor) -> None:
        of = self._sample_of(len(values))
        for sample in of.unique().tolist():
            grad = torch.zeros(self.shapes[name])
            self._add(name, sample, grad.index_add_(0, row_ids[of == sample], values[of == sample]))

    def experts(self, name: str, row: Tensor, col: Tensor, tokens: Tensor, counts: list[int]) -> None:
        expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        of = torch.bucketize(tokens, self.cu_seqlens[1:], right=True)
        for sample in of.unique().tolist():
            parts = [(of == sample) & (expert == e) for e in range(len(counts))]
            self._add(name, sample, torch.stack([row[p].T @ col[p] for p in parts]))


def samples(seed: int = 0) -> list[dict[str, list[int]]]:
    """Five of 5 to 13 random tokens; the first three tokens of the vocabulary are not among them."""
    draw = np.random.default_rng(seed)
    made = []
    for length in (5, 13, 8, 11, 6):
        ids = draw.integers(3, VOCABULARY, length).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return made


class Tokens:
    """What `load_model` asks of a tokenizer."""

    def __len__(self) -> int:
        return VOCABULARY


def load(family: str, how: str) -> nn.Module:
    """The model as a run would load it, with random values where training starts from zeros or ones."""
    from dataflex.config import load_config
    from dataflex.engine.models.model import load_model

    settings = {
        "model_name_or_path": family,
        "train_from_scratch": True,
        "finetuning_type": how,
        "dataset": "none",
        "output_dir": "unused",
    }
    torch.manual_seed(0)
    model = load_model(load_config(settings, quiet=True), tiny_config(family), Tokens())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def true_gradients(module: nn.Module, pool: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """{name: float64 [S, *shape]} by plain autograd, one sample at a time; constants of the forward are float64 too."""
    torch.set_default_dtype(torch.float64)
    exact: Any = copy.deepcopy(module).double().eval()
    for part in exact.modules():
        if hasattr(part, "config") and hasattr(part.config, "_experts_implementation"):
            part.config._experts_implementation = "eager"
    found: dict[str, list[Tensor]] = {}
    for sample in pool:
        exact.zero_grad(set_to_none=True)
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        logits = exact(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
        for name, p in exact.named_parameters():
            if p.requires_grad:
                found.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad)
    torch.set_default_dtype(torch.float32)
    return {name: torch.stack(grads) for name, grads in found.items()}


def compare(got: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a sample's gradient of a parameter, and which parameter.

    Relative to the parameter's gradient, or to a thousandth of the sample's whole one where that is larger.
    """
    whole = torch.stack([g.flatten(1).norm(dim=1) for g in truth.values()]).norm(dim=0)
    worst, where = 0.0, ""
    for name, grads in got.items():
        exact = truth[name].flatten(1)
        scale = torch.maximum(exact.norm(dim=1), 1e-3 * whole)
        error = float(((grads.double().flatten(1) - exact).norm(dim=1) / scale).nan_to_num(torch.inf).max())
        if error > worst:
            worst, where = error, name
    return worst, where


def check(family: str, how: str) -> dict[str, Any]:
    """A row of the table: what scoring says, and one training step."""
    from dataflex.utils.errors import UserError

    row: dict[str, Any] = {"family": family, "finetuning": how}
    try:
        module = load(family, how)
    except UserError as exc:
        return row | {"result": "refused", "detail": str(exc)}
    row["parameters"] = sum(p.numel() for p in module.parameters())
    pool = samples()
    try:
        engine = engine_for(module, pool, None, micro_batch=len(pool), steps=1, lr=1e-3)
    except UserError as exc:
        return row | {"result": "refused", "detail": str(exc)}
    try:
        truth = true_gradients(module, pool)
    except RuntimeError as exc:
        return row | {"result": "no truth", "detail": f"its own code does not run in float64: {exc}"}
    row |= scored(engine, truth, None)
    none = [name for name, grads in truth.items() if not grads.any()]
    if row["result"] == "not covered" and none:
        # The forward has no use for these, as for the cross-attention of a decoder alone; the others count.
        rest = scored(engine, truth, [f"!{name}" for name in none])
        row |= rest | {"detail": f"{len(none)} parameters have no gradient, as {none[0]}; " + rest["detail"]}
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    try:
        (loss,) = [engine.training_step(batch) for batch in engine.batches()]
        moved = [n for n, p in module.named_parameters() if n in before and not torch.equal(before[n], p)]
        row |= {"loss": f"{loss:.3f}", "trained": len(before), "moved": len(moved)}
    except UserError as exc:
        row |= {"result": "refused", "detail": str(exc)}
    return row


def scored(engine: Any, truth: dict[str, Tensor], layers: list[str] | None) -> dict[str, Any]:
    """Result, error and detail of one padded batch against the truth."""
    from dataflex.scoring.gradients.coverage import find_targets
    from dataflex.scoring.gradients.layers import LayerRule
    from dataflex.utils.errors import UserError

    pool, order = samples(), []
    sink = GradientSink(engine.module)
    try:
        targets = find_targets(engine.module, LayerRule.of(layers, None))
        engine.scorer.run_backward(
            pool, np.arange(len(pool)), targets, sink, lambda places, _: order.append(places), "scoring gradients"
        )
    except UserError as exc:
        return {"result": "not covered", "error": "", "detail": str(exc)}
    (places,) = order
    error, where = compare(sink.found, {name: grads[places] for name, grads in truth.items()})
    exact = error < TOLERANCE
    return {"result": "exact" if exact else "WRONG", "error": f"{error:.1e}", "detail": "" if exact else where}


def child(family: str, how: str, answers: Any) -> None:
    """`check`, with whatever it raises as a row that says so."""
    torch.set_num_threads(1)
    start_process()
    started = time.monotonic()
    try:
        row = check(family, how)
    except Exception as exc:
        traceback.print_exc()
        text = " ".join(str(exc).split())[:300]
        row = {"family": family, "finetuning": how, "result": "CRASH", "detail": f"{type(exc).__name__}: {text}"}
    answers.send(row | {"seconds": round(time.monotonic() - started, 1)})
    answers.close()
    end_process()


def run(family: str, how: str) -> dict[str, Any]:
    """`check` in a process of its own."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(family, how, theirs))
    process.start()
    theirs.close()
    row = {"family": family, "finetuning": how, "result": "CRASH", "detail": f"no answer in {LIMIT_S} s"}
    try:
        if mine.poll(LIMIT_S):
            row = mine.recv()
    except EOFError:
        row["detail"] = "the process died"
    process.kill()
    process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", help="these only")
    parser.add_argument(
        "--csv", type=Path, required=True, help="a row for each; those that are in it are not run again"
    )
    parser.add_argument("--table", type=Path, help="write this page from the whole CSV")
    parser.add_argument("--smoke", action="store_true", help="two families")
    asked = parser.parse_args()
    preload()
    about = machine(torch.device("cpu")) | {"transformers": version("transformers"), "peft": version("peft")}
    rows: list[dict[str, Any]] = []
    if asked.csv.is_file():
        with asked.csv.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
    done = {(row["family"], row["finetuning"]) for row in rows}
    for family in ("llama", "opt") if asked.smoke else asked.families or families():
        for how in HOW:
            if (family, how) in done:
                continue
            rows.append(run(family, how) | about)
            write_csv(asked.csv, rows)
            print(*(f"{rows[-1].get(key, '')}" for key in SHOWN), sep="  ", flush=True)
    if asked.table:
        names = ", ".join(f"{name} {rows[0][name]}" for name in ("transformers", "peft", "torch"))
        asked.table.write_text(table(rows, "python benchmarks/families.py", f"{rows[0]['hardware']}, {names}"))


def preload() -> None:
    """What every child needs, once."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import dataflex.train.trainer.initialize  # noqa: F401

    get_checkpoint_conversion_mapping("llama")


if __name__ == "__main__":
    main()
