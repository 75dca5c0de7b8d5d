"""Time and memory of losses without logits: a step, the output layer alone, and LESS over a trained output layer.

    python benchmarks/bench_head.py [--dtype fp32|bf16] [--words 128256] [--hidden 256] [--layers 2] [--tokens 8192]
                                    [--rows 8] [--rounds 7] [--csv FILE] [--smoke] [--model FOLDER]

One process; a Llama of random weights, or --model, a causal language model's folder (what `real_model.py fetch` makes):
then only steps and LESS of that model, LoRA and full. Before timing, the losses of the variants are compared.
``ratio``: the median of the ratios of neighbouring rounds to the variant named in ``against``; ``peak_ratio`` likewise
of the peak memory, that of a call above what the process held before it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Bench, Row, Variant, machine, relative_error
from process_group import end_process, start_process
from torch import Tensor

import dataflex
from dataflex.forward import fused
from dataflex.ops.losses.linear_products import Products
from dataflex.ops.losses.linear_sweep import Sweep, Weights
from dataflex.ops.losses.loss_linear import linear_losses
from dataflex.ops.losses.loss_options import LossOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEATURES: dict[str, Any] = {"proj_dim": 8192, "seed": 1, "adam": "adam_less"}
PLAIN, WITH, WITHOUT = "transformers + DeepSpeed", "dataflex, logits", "dataflex"


@dataclass(frozen=True)
class Size:
    """The model and the micro-batch: ``rows`` samples of together ``tokens`` tokens; folder: of a model, or empty."""

    words: int
    hidden: int
    layers: int
    tokens: int
    rows: int
    dtype: str
    folder: str = ""

    @classmethod
    def of_folder(cls, folder: str, tokens: int, rows: int, dtype: str) -> Size:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        return cls(config.vocab_size, config.hidden_size, config.num_hidden_layers, tokens, rows, dtype, folder)

    def samples(self, count: int) -> list[dict[str, list[int]]]:
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.words, (count, self.tokens // self.rows), generator=draw).tolist()
        return [{"input_ids": row, "labels": row} for row in ids]

    def model(self, kind: str) -> Any:
        """kind: ``lora``, ``full`` or ``tied``."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        if self.folder:
            net: Any = AutoModelForCausalLM.from_pretrained(self.folder)
            net.config.use_cache = False
        else:
            config = LlamaConfig(
                vocab_size=self.words,
                hidden_size=self.hidden,
                intermediate_size=2 * self.hidden,
                num_hidden_layers=self.layers,
                num_attention_heads=max(1, self.hidden // 32),
                max_position_embeddings=self.tokens,
                tie_word_embeddings=kind == "tied",
                use_cache=False,
            )
            net = LlamaForCausalLM(config)
        if kind == "lora":
            net = get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        net = net.to(DTYPES[self.dtype])
        net.enable_input_require_grads()
        net.activation_checkpointing_enable({"use_reentrant": False})
        return net

    def deepspeed(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.rows,
            "zero_optimization": {"stage": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "steps_per_print": 2**31,
            **({"bf16": {"enabled": True}} if self.dtype == "bf16" else {}),
        }

    def row(self) -> Row:
        return {
            "model": Path(self.folder).name if self.folder else "Llama, random weights",
            "layers": self.layers,
            "hidden": self.hidden,
            "words": self.words,
            "tokens": self.tokens,
            "dtype": self.dtype,
        }


class Pad:
    pad_token_id = 0


def engine_of(size: Size, kind: str, mode: str, **flex: Any) -> Any:
    return dataflex.initialize(
        model=size.model(kind),
        config=size.deepspeed(),
        train_dataset=size.samples(4 * size.rows),
        tokenizer=Pad(),
        dataflex={
            "train_step": 10_000,
            "fused_head": mode,
            "scoring_batch_tokens": size.tokens,
            "weight_normalization": "tokens",
            **flex,
        },
    )


def stepping(engine: Any) -> Variant:
    batches = engine.batches()
    return lambda: engine.training_step(next(batches))


def plain_steps(size: Size, kind: str) -> Variant:
    """The loop of the frameworks by themselves, each batch in turn."""
    import deepspeed

    net = size.model(kind)
    trained = [p for p in net.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, config=size.deepspeed(), model_parameters=trained)
    engine.train()
    rows = [sample["input_ids"] for sample in size.samples(4 * size.rows)]

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.tensor(rows, device=engine.device).split(size.rows)

    feed = batches()

    def step() -> float:
        ids = next(feed)
        loss = engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def measured(bench: Bench, what: str, size: Size, variants: dict[str, Variant], against: str) -> list[Row]:
    taken = bench.times(variants)
    peaks = {name: bench.peak_mib(variant) for name, variant in variants.items()}
    rows = []
    for name, times in taken.items():
        ratio = statistics.median(a / b for a, b in zip(times, taken[against], strict=True))
        rows.append(
            {
                "what": what,
                "implementation": name,
                "median_ms": round(statistics.median(times), 2),
                "against": against,
                "ratio": round(ratio, 3),
                "peak_mib": round(peaks[name], 1),
                "peak_ratio": round(peaks[name] / max(peaks[against], 1e-9), 3),
                **size.row(),
            }
        )
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def steps(bench: Bench, size: Size, kind: str) -> list[Row]:
    variants = {PLAIN: plain_steps(size, kind)}
    variants |= {name: stepping(engine_of(size, kind, mode)) for name, mode in ((WITH, "off"), (WITHOUT, "on"))}
    weighted = {"train_type": "dynamic_weight", "component_name": "loss", "weight_normalization": "mean"}
    variants["dataflex, weights from the losses"] = stepping(engine_of(size, kind, "on", **weighted))
    first = {name: variants[name]() for name in (WITH, WITHOUT)}
    apart = abs(first[WITH] / first[WITHOUT] - 1)
    assert apart < (1e-5 if size.dtype == "fp32" else 1e-3), f"losses differ by {apart}"
    return measured(bench, f"{kind} step", size, variants, PLAIN)


def head_alone(bench: Bench, size: Size) -> list[Row]:
    """Losses and gradients of hidden states and weight, by PyTorch and in chunks, with weights before and after."""
    dtype, device = DTYPES[size.dtype], bench.device
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(size.tokens, size.hidden, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(size.words, size.hidden, generator=draw) * size.hidden**-0.5).to(device, dtype)
    labels = torch.randint(0, size.words, (size.tokens,), generator=draw).to(device)
    ends = torch.tensor([0, size.tokens], device=device)
    factors = torch.rand(size.tokens, generator=draw).to(device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    how = Sweep(LossOptions(), fused.CHUNK_TOKENS[kind], half_logits=kind == "cpu" and dtype is not torch.float32)

    def plain() -> list[Tensor]:
        each = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
        return grads((each * factors).sum())

    def grads(total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [t for t in (hidden, weight) if t.requires_grad]))

    def ours(known: Tensor | None, by: Tensor | None) -> list[Tensor]:
        products = Products(((hidden, weight),))
        losses, total, _ = linear_losses(products, labels, ends, Weights(factors=known), how)
        return grads((losses.token_loss if by is None else losses.token_loss * by).sum() if total is None else total)

    rows = []
    for what, trained in (("frozen head alone", False), ("trained head alone", True)):
        weight.requires_grad_(trained)
        ones = torch.ones_like(factors)
        variants: dict[str, Variant] = {
            "PyTorch": plain,
            "unweighted": lambda t=trained, o=ones: ours(o if t else None, None),
            "weights known before": lambda: ours(factors, factors),
            "weights from the losses": lambda: ours(None, factors),
        }
        error = relative_error(variants["weights known before"]()[0], plain()[0])
        assert error < (1e-4 if size.dtype == "fp32" else 2e-2), f"gradients differ by {error}"
        rows += measured(bench, what, size, variants, "PyTorch")
    return rows


def scoring(bench: Bench, size: Size, kind: str) -> list[Row]:
    """LESS features over all parameters, against a training step of the same batch."""
    variants = {}
    for name, mode in ((WITH, "off"), (WITHOUT, "on")):
        engine = engine_of(size, kind, mode)
        variants[f"a step: {name}"] = step = stepping(engine)
        step()
        pool, count = engine.run.pool, torch.arange(size.rows).numpy()
        variants[f"features: {name}"] = lambda e=engine, p=pool, c=count: e.scorer.gradient_features(p, c, **FEATURES)
    got, want = (torch.from_numpy(variants[f"features: {name}"]()) for name in (WITHOUT, WITH))
    error = relative_error(got, want)
    assert error < (5e-2 if size.dtype == "fp32" else 0.3), f"features differ by {error}"
    return measured(bench, f"LESS, {kind}", size, variants, f"a step: {WITHOUT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    for name, value in (("words", 128_256), ("hidden", 256), ("layers", 2), ("tokens", 8192), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", default="")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    size = Size(asked.words, asked.hidden, asked.layers, asked.tokens, asked.rows, asked.dtype)
    if asked.model:
        size = Size.of_folder(asked.model, asked.tokens, asked.rows, asked.dtype)
    elif asked.smoke:
        size = Size(512, 32, 1, 64, 2, asked.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, asked.rounds, asked.smoke)
    start_process()
    rows = [] if size.folder else head_alone(bench, size)
    for kind in ("lora", "full"):
        rows += steps(bench, size, kind)
    for kind in ("lora", "full") if size.folder else ("full", "tied"):
        rows += scoring(bench, size, kind)
    if asked.csv:
        rows = [row | machine(device) for row in rows]
        with Path(asked.csv).open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    end_process()


if __name__ == "__main__":
    main()
