"""A Llama of 1.1B random weights in bf16, LoRA of rank 128, ZeRO-3 on one device: training, LESS scoring, batch-1.

    python benchmarks/gpu/real_run.py [--device cuda|cpu] [--csv FILE] [--smoke]

Tokens per second of training steps, samples per second of LESS features (8 tokens of warm-up before), of losses, and of
one backward and projection a sample, as the official recipe does it; the peak memory of each. The features of both ways
are compared. --smoke: a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from less_setup import llama, synthetic, with_lora
from measure import machine
from process_group import end_process, start_process

PROJ_DIM, SEED, ADAM = 4096, 1, "adam_less"


class Size(NamedTuple):
    width: int
    layers: int
    vocabulary: int
    rank: int
    longest: int
    micro: int
    steps: int
    samples: int


REAL, SMOKE = Size(2048, 22, 32000, 128, 1024, 8, 6, 256), Size(64, 2, 259, 4, 64, 4, 3, 16)


class Log:
    """Rows, printed and written as they come."""

    def __init__(self, file: Path | None, device: torch.device) -> None:
        self.device = device
        self.file = file
        self.facts = machine(device)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(["what", "value", "unit", "peak_gib", *self.facts])

    def say(self, what: str, value: float, unit: str, peak_gib: float = float("nan")) -> None:
        print(f"{what}: {value:.5g} {unit}, peak {peak_gib:.2f} GiB", flush=True)
        if self.file is not None:
            self._append([what, f"{value:.6g}", unit, f"{peak_gib:.3f}", *self.facts.values()])

    def _append(self, row: list[Any]) -> None:
        assert self.file is not None
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def clock(self, call: Callable[[], Any]) -> tuple[Any, float, float]:
        """What ``call`` returns, its seconds, and the device's peak memory in GiB."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        return result, time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def model_of(size: Size, device: torch.device) -> Any:
    with torch.device(device):
        net = llama(size.width, size.layers, size.vocabulary)
    return with_lora(net, size.rank).to(device, torch.bfloat16)


def engine_of(net: Any, size: Size) -> Any:
    import dataflex
    from dataflex.data.encoding.collate import Collator

    named, target = synthetic(size.samples, 8, size.longest)
    config = {
        "train_micro_batch_size_per_gpu": size.micro,
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": None,
    }
    return dataflex.initialize(
        model=net,
        config=config,
        train_dataset=named,
        eval_dataset={"target": target},
        data_collator=Collator(0),
        dataflex={"train_step": size.steps},
    )


def train(engine: Any, log: Log) -> None:
    seconds, tokens, peak = [], [], float("nan")
    for batch in engine.batches():
        _, taken, peak = log.clock(lambda b=batch: engine.training_step(b))
        seconds.append(taken)
        tokens.append(sum(micro.labels.numel() for micro in batch.micro_batches))
    half = len(seconds) // 2
    log.say("training", sum(tokens[half:]) / sum(seconds[half:]), "tokens/s", peak)


def score(engine: Any, log: Log) -> np.ndarray:
    pool, scorer = engine.run.pool, engine.scorer
    how = {"proj_dim": PROJ_DIM, "seed": SEED, "adam": ADAM}
    scorer.gradient_features(pool, np.arange(4), **how)
    features, seconds, peak = log.clock(lambda: scorer.gradient_features(pool, None, **how))
    assert np.isfinite(features).all()
    log.say("LESS features", len(pool) / seconds, "samples/s", peak)
    _, seconds, peak = log.clock(lambda: scorer.losses(pool))
    log.say("losses", len(pool) / seconds, "samples/s", peak)
    return features


def batch_one(engine: Any, reference: Any, features: np.ndarray, log: Log) -> None:
    """One backward a sample with LoRA's own gradients, then the same projection."""
    from deepspeed import zero

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    plain = {name: p for name, p in reference.named_parameters() if name in trained}
    with zero.GatheredParameters(list(trained.values())), torch.no_grad():
        for name, parameter in plain.items():
            parameter.copy_(trained[name])
    reference.eval()
    state, transform = engine.scorer.moments(list(trained), ADAM)
    moments = dict(state)
    count = min(16, len(engine.run.pool))
    rows, seconds, peak = log.clock(
        lambda: torch.stack(
            [
                sample_features(engine.run.pool[i], reference, plain, moments, transform, log.device)
                for i in range(count)
            ]
        )
    )
    log.say("batch-1 backward and projection", count / seconds, "samples/s", peak)
    right = rows.cpu().numpy()
    log.say(
        "features of both ways, relative difference",
        np.linalg.norm(features[:count] - right) / np.linalg.norm(right),
        "",
    )


def sample_features(
    sample: Any, net: Any, plain: dict[str, Any], moments: Any, transform: Any, device: torch.device
) -> torch.Tensor:
    from dataflex.ops import Projection, Sums, project_per_sample_grad_, tensor_id

    ids, labels = (torch.tensor([list(sample[key])], device=device) for key in ("input_ids", "labels"))
    logits = net(input_ids=ids).logits[0, :-1].float()
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels[0, 1:]), list(plain.values()))
    out = torch.zeros(1, PROJ_DIM, device=device)
    for name, grad in zip(plain, gradients, strict=True):
        m, v = moments[name]
        rows, bounds = torch.eye(len(grad), device=device), torch.tensor([0, len(grad)], device=device)
        of = Projection(tensor_id(name), SEED, transform, exp_avg=m, exp_avg_sq=v)
        project_per_sample_grad_(Sums(out), rows, grad.float(), bounds, of)
    return out[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    size, device = SMOKE if asked.smoke else REAL, torch.device(asked.device)
    start_process()
    log = Log(asked.csv, device)
    net, seconds, peak = log.clock(lambda: model_of(size, device))
    log.say("model of", sum(p.numel() for p in net.parameters()) / 1e9, "billion parameters", peak)
    reference = copy.deepcopy(net)
    engine, seconds, peak = log.clock(lambda: engine_of(net, size))
    log.say("engine", seconds, "s", peak)
    train(engine, log)
    features = score(engine, log)
    batch_one(engine, reference, features, log)
    end_process()


if __name__ == "__main__":
    main()
