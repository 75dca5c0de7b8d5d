"""Embeddings against transformers' own hidden states, of every layer; what is computed; what is kept and taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.data.encoding.collate import Collator
from dataflex.data.pool import Pool
from dataflex.engine.folder.identity import weights_identity
from dataflex.engine.models.embedder import Embedder
from dataflex.scoring.kept.sharded import ScoringPasses
from dataflex.scoring.passes.embed_pass import embeddings
from dataflex.scoring.passes.hidden_states import check_layer, decoder_of
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from tests import tiny_engine as tiny
from tests.distributed import run_ranks
from tests.tiny import byte_tokenizer, tiny_llama

# kind of model, ZeRO stage, packed, checkpointing, layer, pooling
WAYS = [
    ("full", 0, False, None, -1, "weighted"),
    ("full", 3, True, "reentrant", 1, "weighted"),
    ("lora", 3, False, None, -1, "mean"),
    ("lora", 0, False, "non-reentrant", 1, "trained"),
    ("lora", 2, True, None, -2, "last"),
]


def samples() -> list[dict[str, Any]]:
    return tiny.samples(13, seed=5)


def by_transformers(net: Any, pool: list[Any], pooling: str, layer: int) -> np.ndarray:
    """Unit embeddings in float64 from the model's own hidden states, weighted by hand, one sample at a time."""
    net = net.double().eval()
    found = []
    for sample in pool:
        with torch.no_grad():
            every = net(input_ids=torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states
        states = (every[1:][layer] if layer < 0 else every[layer])[0]
        trained = torch.tensor([*sample["labels"][1:], -100]) != -100  # of the next token
        places = torch.arange(1.0, len(states) + 1, dtype=torch.float64)
        weights = {"weighted": places, "mean": torch.ones(len(states)), "trained": trained.double()}.get(pooling)
        vector = states[-1] if weights is None else (weights[:, None] * states).sum(0) / weights.sum()
        found.append(vector / vector.norm())
    return torch.stack(found).numpy()


def engine_of(kind: str, stage: int, packing: bool = False, checkpointing: str | None = None, **more: Any) -> Any:
    net = tiny.model(kind, use_cache=False)
    tiny.checkpoint_activations(net, checkpointing)
    return dataflex.initialize(
        model=net,
        config=tiny.ds_config(stage, micro_batch=4 // dist.world_size()),
        dataflex={"train_step": 1, "scoring_batch_tokens": 70, **more},
        train_dataset=tiny.samples(8, seed=3),
        data_collator=Collator(0, packing=packing, cutoff_len=50),
        tokenizer=byte_tokenizer(),
    )


def one_way(kind: str, stage: int, packing: bool, checkpointing: str | None, layer: int, pooling: str) -> Any:
    """Largest error, and how many tokens a later layer and the output layer were given."""
    engine = engine_of(kind, stage, packing, checkpointing)
    seen = {"layer": 0, "head": 0}
    handles = [
        part.register_forward_hook(
            lambda _m, args, _o, name=name: seen.update({name: seen[name] + args[0][..., 0].numel()})
        )
        for name, part in (
            ("layer", decoder_of(engine.module).layers[-1]),
            ("head", engine.module.get_output_embeddings()),
        )
    ]
    got = embeddings(engine.scorer, samples(), pooling=pooling, layer=layer, unit=True)
    for handle in handles:
        handle.remove()
    want = by_transformers(tiny.model(kind), samples(), pooling, layer)
    assert all(m.training for m in engine.module.modules()) and not any(
        p.grad is not None for p in engine.module.parameters()
    )
    return [float(np.abs(got - want).max()), seen]


def kept(folder: Path) -> dict[str, Any]:
    """How many samples are embedded by passes one after the other over one folder, and whether they are the same."""
    engine = engine_of("full", 0)
    pool = Pool.from_datasets(samples())
    counts: dict[str, int] = {}
    vectors: dict[str, Any] = {}

    def run(name: str, pooling: str = "mean", layer: int = -1, step: int = 0) -> None:
        counts[name] = 0

        def call(ids: Any) -> Any:
            counts[name] += len(ids)
            return embeddings(engine.scorer, pool, ids, pooling=pooling, layer=layer, unit=True)

        def made_from() -> dict[str, str]:
            return {**weights_identity(engine.engine, "base", False), "pooling": pooling, "layer": str(layer)}

        passes = ScoringPasses(folder, name, shard_samples=5)
        found = passes.vectors(engine.scorer, pool, call, width=32, made_from=made_from)
        vectors[name] = found.rows(np.arange(13), torch.device("cpu")).tolist()

    run("first")
    run("again, for another selector")
    run("another pooling", pooling="last")
    run("another layer", layer=1)
    if dist.is_main():
        newest = max((folder / "embeddings").iterdir(), key=lambda p: p.stat().st_mtime)
        files = sorted(newest.glob("embeddings-*.npy"))
        assert [np.load(f).dtype for f in files] == [np.float32] * 3
        files[1].unlink()
    dist.barrier()
    run("a shard is lost", layer=1)
    engine.training_step(next(engine.batches()))
    run("after a step")
    return {"counts": counts, "vectors": vectors}


def another_model(folder: Path) -> dict[str, Any]:
    """Embeddings by models of their own: of the same vocabulary, of another, and an encoder."""
    run = byte_tokenizer()
    if dist.is_main():
        tiny_llama(seed=3).save_pretrained(folder / "same")
        run.save_pretrained(folder / "same")
        tiny_llama(seed=4, max_position_embeddings=20).save_pretrained(folder / "other")
        reversed_tokenizer().save_pretrained(folder / "other")
        tiny_bert().save_pretrained(folder / "encoder")
        run.save_pretrained(folder / "encoder")
    dist.barrier()
    engine = engine_of("lora", 3)
    texts = ["two and two is four", "blue", "a longer sentence about nothing at all"]
    pool = [{"input_ids": run(t)["input_ids"], "labels": run(t)["input_ids"]} for t in texts]
    every = np.arange(len(pool))
    model_section: Any = _ModelSection()
    found: dict[str, Any] = {}
    for name, pooling, layer in (("same", "weighted", -1), ("other", "weighted", 1), ("encoder", "mean", 2)):
        embedder = Embedder(str(folder / name), engine.scorer, run, model_section)
        embedder.check(pooling, layer, "near")
        found[name] = embedder.embeddings(pool, every, pooling=pooling, layer=layer).tolist()
        found[f"{name}: identity"] = embedder.identity()
        embedder.close()
    refused = []
    for name, pooling, layer in (("other", "trained", -1), ("same", "mean", 3), ("missing", "mean", -1)):
        try:
            Embedder(str(folder / name), engine.scorer, run, model_section).check(pooling, layer, "near")
        except UserError as error:
            refused.append(str(error).replace(str(folder), "F"))
    return found | {"refused": refused}


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=259, max_position_embeddings=64, **sizes))


class _ModelSection:
    trust_remote_code, cache_dir = False, None


def reversed_tokenizer() -> Any:
    """A byte-level tokenizer whose ids run the other way, with a token at the end of each text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {word: 261 - i if i > 2 else i for word, i in vocabulary.items()}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def everything(folder: str) -> dict[str, Any]:
    ways = [one_way(*way) for way in WAYS]
    return {"ways": ways, "kept": kept(Path(folder, "kept")), "models": another_model(Path(folder))}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {
        world: run_ranks(
            "tests.scoring.test_embed_pass:everything", world, folder=str(tmp_path_factory.mktemp(f"embed{world}"))
        )
        for world in (1, 2)
    }


@pytest.mark.parametrize("at", range(len(WAYS)), ids=[f"{w[0]} {w[1]} layer {w[4]} {w[5]}" for w in WAYS])
def test_they_are_transformers_own_hidden_states(results: dict[int, list[dict[str, Any]]], at: int) -> None:
    for ranks in results.values():
        for rank in ranks:
            assert rank["ways"][at][0] < 1e-5


@pytest.mark.parametrize("at", range(len(WAYS)))
def test_nothing_is_computed_above_the_layer(results: dict[int, list[dict[str, Any]]], at: int) -> None:
    """Under ZeRO-3 the forward runs to its end: then the output layer gets one token of a row."""
    _, stage, packing, _, layer, _ = WAYS[at]
    for rank in results[1]:
        seen = rank["ways"][at][1]
        tokens = sum(len(s["input_ids"]) for s in samples())
        assert (seen["layer"] >= tokens) == (layer == -1 or stage == 3)
        assert seen["layer"] == 0 or seen["layer"] >= tokens
        assert (0 < seen["head"] <= 13) if stage == 3 else seen["head"] == 0
        assert not (packing and stage == 3) or seen["head"] < 13


def test_kept_vectors_are_taken_up_by_whatever_asks_for_the_same(results: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in results.values():
        for rank in ranks:
            counts, vectors = rank["kept"]["counts"], rank["kept"]["vectors"]
            assert counts == {
                "first": 13,
                "again, for another selector": 0,
                "another pooling": 13,
                "another layer": 13,
                "a shard is lost": 5,
                "after a step": 13,
            }
            assert vectors["first"] == vectors["again, for another selector"]
            assert vectors["another layer"] == vectors["a shard is lost"]
            assert len({str(rows) for rows in vectors.values()}) == 4
    one, two = (np.array(results[world][0]["kept"]["vectors"]["another pooling"]) for world in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_another_models_tokens_are_its_own(results: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    texts = ["two and two is four", "blue", "a longer sentence about nothing at all"]
    run, other = byte_tokenizer(), reversed_tokenizer()
    pools = [[{"input_ids": t(text)["input_ids"], "labels": []} for text in texts] for t in (run, other)]
    assert pools[1][1]["input_ids"] == [261 - i for i in pools[0][1]["input_ids"]] + [2]
    cut = [{**sample, "input_ids": sample["input_ids"][:20]} for sample in pools[1]]
    for ranks in results.values():
        for rank in ranks:
            found = rank["models"]
            np.testing.assert_allclose(
                found["same"], by_transformers(tiny_llama(seed=3), pools[0], "weighted", -1), atol=1e-5
            )
            want = by_transformers(tiny_llama(seed=4, max_position_embeddings=20), cut, "weighted", 1)
            np.testing.assert_allclose(found["other"], want, atol=1e-5)
            np.testing.assert_allclose(found["encoder"], by_transformers(tiny_bert(), pools[0], "mean", 2), atol=1e-5)
            assert found["refused"] == [
                "near: pooling: which tokens are trained is not known to 'F/other', whose tokenizer is another; valid: "
                "weighted, mean, last",
                "near: layer: 3; valid: a layer's number from 1 to 2, or from the end: -1 (the last) to -2",
                found["refused"][2],
            ]
            assert found["refused"][2].startswith("embedding_model: no model config at 'F/missing': ")


def test_a_models_identity_is_its_weights_and_tokens(results: dict[int, list[dict[str, Any]]]) -> None:
    every = [rank["models"] for ranks in results.values() for rank in ranks]
    for name in ("same", "other", "encoder"):
        assert len({str(found[f"{name}: identity"]) for found in every}) == 1
    same, other = every[0]["same: identity"], every[0]["other: identity"]
    assert same.keys() == other.keys() == {"embedding_model", "tokens"}
    assert same["embedding_model"] != other["embedding_model"] and same["tokens"] != other["tokens"]


@pytest.mark.parametrize("layer", [0, 3, -3, 1.0, True, "last"])
def test_a_layer_that_the_model_lacks_is_refused(layer: Any) -> None:
    with pytest.raises(UserError, match=r"rds: layer: .*; valid: a layer's number from 1 to 2, or from the end"):
        check_layer(decoder_of(tiny_llama()), layer, "rds")
    check_layer(decoder_of(tiny_llama()), -1)
