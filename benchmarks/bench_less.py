"""What LESS scoring costs: against training on the same samples, and against the official way, on one machine.

    python benchmarks/bench_less.py [--data FOLDER] [--csv FILE] [--rounds 5] [--only speed|pool] [--smoke]

One small Llama with LoRA, one set of samples of mixed lengths (real text where FOLDER is given, a dataset_dir as in
benchmarks/README.md, else random tokens), one process; the variants take turns and figures are medians. Features are
compared with single-sample autograd before anything is timed.

training: forward, backward and optimizer step of the same model over the very batches that are scored.
scoring: `less`'s pass over the pool, Adam's moments and projection included.
official way: one backward per sample, the Adam form, then TRAK's projector over 16 stacked gradients in float32
(CudaProjector on a GPU); it needs `pip install traker` (and fast_jl on a GPU), best into an environment of its own;
its rows are left out where it is missing. With the projector's fp16 default, products on a CPU are slow because
CPUs have no fast fp16 product in PyTorch, which says nothing about the method: the projection is timed at a 16th of
the size and multiplied. The pool rows score 1k, 10k and 100k samples with a tiny model: time per sample and peak
memory should not change. On a GPU the model has 1.1 billion parameters in bf16 and LoRA of rank 128.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from fidelity import Case, adam_less, features
from less_setup import (
    Sample,
    engine_for,
    llama,
    real_text,
    show,
    synthetic,
    with_lora,
    write_csv,
)
from measure import Bench, Row, machine, relative_error
from process_group import end_process, start_process
from reference_less import Adam, sample_gradients, stacked, trained

SEED, STACK = 1, 16
TRAINING, SCORING = "training", "scoring"
SINGLE, OFFICIAL = "batch-1 backward, not projected", "official way: batch-1 backward + TRAK fp32 on 16"
HALF = "official way with the projector in fp16"
SHOWN = ("what", "samples_per_s", "tokens_per_s", "ratio", "against", "allocated_mib", "peak_mib", "note")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "pool"))
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def model(device: torch.device, smoke: bool) -> Any:
    if smoke:
        return with_lora(llama(32, 1), 4)
    if device.type == "cpu":
        return with_lora(llama(256, 6), 16)
    return with_lora(llama(2048, 22, vocabulary=32000), 128).to(device, torch.bfloat16)


class Subject:
    """The engine after a few steps, the samples, and every way to go over them once."""

    def __init__(self, named: dict[str, list[Sample]], target: list[Sample], asked: argparse.Namespace) -> None:
        self.device = torch.device(asked.device)
        self.proj_dim = 512 if asked.smoke else asked.proj_dim
        micro = 4 if asked.smoke else 8
        net = model(self.device, asked.smoke)
        steps = 2 if asked.smoke else 8
        self.engine = engine_for(net, named, {"target": target}, micro_batch=micro, steps=steps, lr=1e-4)
        for batch in self.engine.batches():
            self.engine.training_step(batch)
        self.net = self.engine.module
        self.pool = self.engine.run.pool
        self.batches = self._batches()
        self.adam = self._adam()

    def _batches(self) -> list[Any]:
        """The batches of a scoring pass: under the token budget of a training batch, longest samples first."""
        from dataflex.data.encoding.collate import Collator
        from dataflex.scoring.batches import bucket

        ids = np.arange(len(self.pool), dtype=np.int64)
        collate = Collator(0)
        parts = bucket(ids, self.pool.lengths, self.engine.scorer.token_budget)
        return [collate([self.pool[int(i)] for i in part]) for part in parts]

    def _adam(self) -> Adam:
        from dataflex.engine.optimizer_state import read_moments

        names = list(trained(self.net))
        moments, how = read_moments(self.engine.engine, names)
        moments = dict(moments)
        first, second = (torch.cat([moments[n][i].flatten() for n in names]) for i in (0, 1))
        return Adam(first, second, how.beta1, how.beta2, how.eps)

    def train(self, batches: Sequence[Any] | None = None) -> None:
        from dataflex.forward.split import split_batch
        from dataflex.ops import per_sample_loss

        self.net.train()
        for batch in self.batches if batches is None else batches:
            inputs, labels, _, cu_seqlens = split_batch(dict(batch), self.device)
            logits = self.engine.engine(**inputs).logits
            loss = per_sample_loss(logits.flatten(0, 1), labels, cu_seqlens).loss.mean()
            self.engine.engine.backward(loss)
            self.engine.engine.step()

    def score(self, ids: Any = None) -> np.ndarray:
        """Features of the samples, [n, proj_dim]."""
        self.net.eval()
        how = {"proj_dim": self.proj_dim, "seed": SEED, "adam": "adam_less"}
        return self.engine.scorer.gradient_features(self.pool, ids, **how)

    def gradients(self, ids: Sequence[int]) -> Iterator[Tensor]:
        self.net.eval()
        return sample_gradients(self.net, [self.pool[i] for i in ids])

    def official(self, project: Callable[[Tensor], Tensor] | None, count: int) -> None:
        """The first ``count`` samples: single gradients, stacked in sixteens and projected."""
        for start in range(0, count, STACK):
            ids = range(start, min(start + STACK, count))
            rows = stacked((self.adam.direction(g.float()) for g in self.gradients(ids)), len(ids))
            if project is not None:
                project(rows)

    def error(self, ids: Sequence[int]) -> float:
        """Relative error of the features of some samples against single-sample autograd in the same weights."""
        shapes = {name: tuple(p.shape) for name, p in trained(self.net).items()}
        grads = stacked(self.gradients(ids), len(ids)).float().cpu()
        case = Case(shapes, grads, grads[:0], Adam(self.adam.exp_avg.cpu(), self.adam.exp_avg_sq.cpu()), grads[:0])
        want = features(case, grads, adam_less(case), "xorfold", self.proj_dim, SEED)
        return relative_error(torch.from_numpy(self.score(np.array(ids))), want)


def projector(size: int, proj_dim: int, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """TRAK's, as LESS uses it; None where it is not installed."""
    try:
        from trak.projectors import BasicProjector, CudaProjector, ProjectionType
    except ImportError:
        return None
    how: dict[str, Any] = {"grad_dim": size, "proj_dim": proj_dim, "seed": 0, "device": device}
    how["proj_type"] = ProjectionType.rademacher
    if device.type == "cpu":
        made = BasicProjector(**how, dtype=dtype)
    else:
        try:
            made = CudaProjector(**how, max_batch_size=STACK)
        except ModuleNotFoundError:
            return None
    return lambda rows: made.project(rows, model_id=0)


def speed_rows(bench: Bench, subject: Subject) -> list[Row]:
    count, tokens = len(subject.pool), int(subject.pool.lengths.sum())
    few = min(count, STACK)
    ids = list(range(0, count, max(1, count // 8)))
    error = subject.error(ids)
    assert error < (1e-3 if bench.device.type == "cpu" else 5e-2), f"wrong features: {error}"
    size = len(subject.adam.exp_avg)
    variants: dict[str, Callable[[], Any]] = {TRAINING: subject.train, SCORING: subject.score}
    variants[SINGLE] = lambda: subject.official(None, count)
    done = {TRAINING: count, SCORING: count, SINGLE: count, OFFICIAL: few}
    project = projector(size, subject.proj_dim, bench.device, torch.float32)
    if project is not None:
        variants[OFFICIAL] = lambda: subject.official(project, few)
    taken = bench.times(variants, slow=(OFFICIAL,))
    rates = {name: [1e3 * done[name] / ms for ms in times] for name, times in taken.items()}
    notes = {SCORING: f"features' relative error {error:.1e}"}
    if project is not None and bench.device.type == "cpu":
        rates[HALF] = [half_rate(bench, subject, few, statistics.median(taken[SINGLE]) * few / count)]
        notes[HALF] = "projection timed at a 16th of proj_dim, multiplied"
    elif project is None:
        print("traker (or, on a GPU, fast_jl) is not installed: the official way is left out")
    rows = []
    for name, values in rates.items():
        for against in (TRAINING,) if name != SCORING else (TRAINING, SINGLE, OFFICIAL, HALF):
            if against in rates and (against != name or name == TRAINING):
                row = speed_row(name, values, against, rates[against], tokens / count)
                rows.append(row | {"note": notes.get(name, "")})
    return rows


def speed_row(name: str, values: list[float], against: str, base: list[float], length: float) -> Row:
    """Rates of a variant; the ratio is the median over rounds where both ran in each, else of the medians."""
    if len(values) == len(base):
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
    else:
        ratio = statistics.median(values) / statistics.median(base)
    rate = statistics.median(values)
    low, high = min(values), max(values)
    return {
        "what": name,
        "samples_per_s": round(rate, 3),
        "samples_per_s_range": f"{low:.3f}-{high:.3f}",
        "tokens_per_s": round(rate * length),
        "ratio": round(ratio, 3),
        "against": against,
    }


def half_rate(bench: Bench, subject: Subject, few: int, backward_ms: float) -> float:
    """Samples per second of the official way with the projector as it is shipped, in fp16."""
    size = len(subject.adam.exp_avg)
    part = max(1, subject.proj_dim // 16)
    project = projector(size, part, bench.device, torch.float16)
    assert project is not None
    rows = torch.randn(few, size)
    times = bench.times({HALF: lambda: project(rows)}, slow=(HALF,))[HALF]
    return 1e3 * few / (backward_ms + statistics.median(times) * subject.proj_dim / part)


def memory_rows(bench: Bench, subject: Subject) -> list[Row]:
    """Peaks above what is allocated before, training against scoring over the same batches: the longest, and all.

    allocated_mib counts what PyTorch asked for; peak_mib, on a CPU, what the process grew by, which holds what the C
    allocator keeps of batches of other lengths as well.
    """
    longest = np.argsort(-subject.pool.lengths, kind="stable")[: len(subject.batches[0]["labels"])].astype(np.int64)
    subject.score(longest)
    pairs = {
        "the longest batch": (lambda: subject.train(subject.batches[:1]), lambda: subject.score(longest)),
        "all batches": (subject.train, subject.score),
    }
    rows = []
    for batches, (train, score) in pairs.items():
        base = f"training, {batches}"
        found = {base: train, f"scoring, {batches}": score}
        allocated = {name: bench.allocated_mib(variant) for name, variant in found.items()}
        peaks = {name: bench.peak_mib(variant) for name, variant in found.items()}
        for name in found:
            row = {"what": name, "peak_mib": round(peaks[name], 1), "allocated_mib": round(allocated[name], 1)}
            row |= {"ratio": round(allocated[name] / allocated[base], 3), "against": base}
            rows.append(row | {"note": f"process: {peaks[name] / peaks[base]:.2f} x"})
    return rows


class Repeated:
    """``count`` samples that are made of few, so that the pool itself takes no memory."""

    def __init__(self, samples: list[Sample], count: int) -> None:
        self.samples, self.count = samples, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index % len(self.samples)]


def pool_rows(bench: Bench) -> Iterator[Row]:
    """`less` over pools of growing size with a tiny model."""
    from dataflex.data.pool import Pool
    from dataflex.train.selector.less_selector import LessSelector

    named, target = synthetic(500, 8, 32)
    samples = named["a"] + named["b"]
    lengths = np.array([len(s["input_ids"]) for s in samples], dtype=np.int32)
    net = with_lora(llama(32, 1), 4).to(bench.device)
    flex = {"scoring_batch_tokens": 4096}
    engine = engine_for(net, samples, {"target": target}, micro_batch=8, steps=2, lr=1e-3, **flex)
    for batch in engine.batches():
        engine.training_step(batch)
    sizes = (100, 200) if bench.smoke else (1_000, 10_000, 100_000)
    for size in sizes:
        ids = np.arange(size)
        pool = Pool(Repeated(samples, size), ids * 0, ["a"], lengths[ids % len(lengths)], "repeated")
        selector = LessSelector(pool, None, None, "", engine.scorer, engine.eval_pool, proj_dim=512, seed=SEED)
        peak = bench.peak_mib(selector.each)
        ms = min(bench.times({"pool": selector.each}, slow=("pool",))["pool"]) if size < sizes[-1] else timed(selector)
        yield {
            "what": f"less over {size:,} samples, tiny model",
            "samples_per_s": round(1e3 * size / ms, 1),
            "tokens_per_s": round(1e3 * float(pool.lengths.sum()) / ms),
            "peak_mib": round(peak, 1),
        }


def timed(selector: Any) -> float:
    """Milliseconds of one pass; the largest pool was gone over once for its memory already."""
    import time

    started = time.perf_counter()
    selector.each()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    asked = arguments()
    start_process()
    bench = Bench(torch.device(asked.device), asked.rounds, asked.smoke)
    rows: list[Row] = []
    if asked.only != "pool":
        count, longest = (10, 24) if asked.smoke else (96, 512)
        data = synthetic(count, 4, longest) if asked.data is None else real_text(asked.data, longest, count, 4)
        subject = Subject(*data, asked)
        rows += speed_rows(bench, subject) + memory_rows(bench, subject)
        parameters = {"lora_parameters": len(subject.adam.exp_avg), "proj_dim": subject.proj_dim}
        rows = [r | parameters | {"text": "random tokens" if asked.data is None else "real"} for r in rows]
    if asked.only != "speed":
        rows += list(pool_rows(bench))
    show(rows, SHOWN)
    if asked.csv:
        write_csv(asked.csv, [row | machine(bench.device) for row in rows])


if __name__ == "__main__":
    main()
    end_process()
