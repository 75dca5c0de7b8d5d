"""Every kind of layer of the common families against float64 single-sample autograd, padded and packed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.data.encoding.collate import Collator
from dataflex.ops import Projection, Sums, Transform, project_per_sample_grad_, tensor_id
from dataflex.scoring.gradients.coverage import find_targets, kind_of
from dataflex.scoring.gradients.exact import exact_dots, mean_directions
from dataflex.scoring.gradients.layers import LayerRule
from dataflex.scoring.scorer import Scorer
from dataflex.utils.errors import UserError
from tests import families

PROJ_DIM, SEED, SAMPLES = 64, 3, 5
CONSTANTS = Transform("adam_less", 0.9, 0.99, 1e-6, 3)


class PlainEngine:
    """What a `Scorer` asks of a DeepSpeed engine."""

    device = "cpu"

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def empty_partition_cache(self) -> None:
        pass


def pool(count: int = SAMPLES, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples with pad tokens inside, which an embedding with padding_idx does not learn from."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(0, families.VOCABULARY, draw.integers(5, 14)).tolist()
        made.append({"input_ids": [*ids, 0, 4], "labels": [-100, *ids[1:], 0, 4]})
    return made


def random_moments(net: torch.nn.Module) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name, p in net.named_parameters():
        found[name] = (torch.randn(p.shape, generator=draw) * 1e-2, torch.rand(p.shape, generator=draw) * 1e-3 + 1e-4)
    return found


def scorer(net: torch.nn.Module, packing: bool = False) -> Scorer:
    moments = random_moments(net)
    collator = Collator(0, packing=packing, cutoff_len=64)
    return Scorer(PlainEngine(net), collator, 40, lambda names: ({n: moments[n] for n in names}, CONSTANTS))


def gradients(
    net: torch.nn.Module, samples: list[Any], adam: str | None = None, dtype: torch.dtype = torch.float64
) -> list[dict[str, torch.Tensor]]:
    """{name: float64 matrix} of each sample, computed in ``dtype``, transformed."""
    exact = copy.deepcopy(net).to(dtype).eval()
    for module in exact.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = "eager"
    moments, how = random_moments(net), Transform("sgd") if adam is None else CONSTANTS
    rows = []
    for sample in samples:
        found = {}
        for name, grad in families.sample_gradient(exact, sample).items():
            m, v = (None, None) if adam is None else (families.as_matrix(x.double()) for x in moments[name])
            found[name] = how(families.as_matrix(grad.double().clone()), m, v)
        rows.append(found)
    return rows


def projected(rows: list[dict[str, torch.Tensor]], projection: str = "xorfold", factors: Any = None) -> torch.Tensor:
    out = torch.zeros(len(rows), PROJ_DIM, dtype=torch.float64)
    for row, found in enumerate(rows):
        for name, value in found.items():
            factor = 1.0 if factors is None else factors.get(name, 0.0)
            one = torch.eye(len(value), dtype=torch.float64) * factor
            of = Projection(tensor_id(name), SEED, kind=projection)
            project_per_sample_grad_(Sums(out).of(row), one, value, torch.tensor([0, len(value)]), of)
    return out


def error(got: Any, truth: torch.Tensor) -> float:
    got = torch.as_tensor(np.asarray(got)).double()
    return float(((got - truth).norm(dim=1) / truth.norm(dim=1)).max())


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("adam", [None, "adam_less"])
def test_every_parameter_of_every_family(family: str, adam: str | None) -> None:
    net, samples = families.model(family).train(), pool()
    truth = projected(gradients(net, samples, adam))
    flags = [p.requires_grad for p in net.parameters()]
    got = scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, adam=adam)
    assert error(got, truth) < 1e-5
    assert net.training and flags == [p.requires_grad for p in net.parameters()]
    assert not any("forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma", "mixtral", "qwen2_moe"])
def test_packed_samples(family: str) -> None:
    net, samples = families.model(family), pool()
    truth = projected(gradients(net, samples, "adam_less"))
    got = scorer(net, packing=True).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, adam="adam_less")
    assert error(got, truth) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", "mixtral", "qwen2_moe"])
def test_lora(family: str) -> None:
    net, samples = families.with_lora(families.model(family)), pool()
    truth = projected(gradients(net, samples, "adam_less"))
    got = scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, adam="adam_less")
    assert error(got, truth) < 1e-5
    unit = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in gradients(net, samples)])
    unit = torch.nn.functional.normalize(unit, dim=1).mean(0)
    found = mean_directions(scorer(net), samples, np.zeros(SAMPLES))
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    assert error(torch.cat([found[n].flatten() for n in names])[None], unit[None]) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(family: str, reentrant: bool) -> None:
    net, samples = families.model(family), pool()
    truth = projected(gradients(net, samples))
    net.enable_input_require_grads()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = scorer(net.train()).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED)
    assert error(got, truth) < 1e-5


@pytest.mark.parametrize(
    "projection", ["countsketch", "sjlt", pytest.param("rademacher", marks=pytest.mark.slow), "kronecker"]
)
def test_other_projections(projection: str) -> None:
    net, samples = families.model("mixtral"), pool(3)
    truth = projected(gradients(net, samples), projection)
    got = scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, projection=projection)
    assert error(got, truth) < 1e-5


RULE = LayerRule.of(["last:1", "embed_tokens", "*.0.mlp.*"], {"experts": 2.0, "last:1": 0.5, "embed_tokens": 3.0})


def test_layers_leave_out() -> None:
    names = [n for n, _ in families.model("mixtral").named_parameters()]
    left = LayerRule.of(["!embed_tokens", "!lm_head", "!last:1"], None).factors(names)
    assert set(left) == {n for n in names if not n.startswith(("model.embed", "lm_head", "model.layers.1."))}
    assert set(LayerRule.of(["!*norm*", "last:1"], None).factors(names)) == {
        n for n in names if ".layers.1." in n and "norm" not in n
    }
    for rule, text in (
        (["!q_prj"], r"layers: 'q_prj' matches no trained parameter \(did you mean 'q_proj'\?\)"),
        (["lm_head", "!lm_head"], "layers: lm_head, !lm_head leaves no trained parameter"),
    ):
        with pytest.raises(UserError, match=text):
            LayerRule.of(rule, None).factors(names)


def test_ends_and_numbers_of_twelve_layers() -> None:
    names = [f"model.layers.{number}.{part}.weight" for number in range(12) for part in ("q", "v")]
    for rule, numbers in (
        (["last:2"], [10, 11]),
        (["first:2"], [0, 1]),
        (["last:12"], list(range(12))),
        (["layers.1"], [1]),
        (["layers.1", "layers.11"], [1, 11]),
        (["layers.1*"], [1, 10, 11]),
    ):
        pattern = [f"*.{one}.*" if "*" in one else one for one in rule]
        found = {int(name.split(".")[2]) for name in LayerRule.of(pattern, None).factors(names)}
        assert sorted(found) == numbers, rule


def test_layers_and_their_weights() -> None:
    net, samples = families.model("mixtral"), pool(3)
    names = [n for n, _ in net.named_parameters()]
    factors = RULE.factors(names)
    assert factors["model.layers.1.mlp.experts.down_proj"] == 1.0
    assert factors["model.layers.0.mlp.experts.down_proj"] == 2.0
    assert factors["model.layers.0.mlp.gate.weight"] == 1.0 and factors["model.embed_tokens.weight"] == 3.0
    assert "lm_head.weight" not in factors and "model.layers.0.self_attn.q_proj.weight" not in factors
    truth = projected(gradients(net, samples, "adam_less"), factors=factors)
    got = scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, adam="adam_less", layers=RULE)
    assert error(got, truth) < 1e-5


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "gemma", "mixtral", "gpt_oss", "apertus"])
@pytest.mark.parametrize(("adam", "rule"), [(None, None), ("adam_less", None), ("adam_less", "weighted")])
def test_exact_scores(family: str, adam: str | None, rule: str | None) -> None:
    net, samples, target = families.model(family), pool(6), pool(5, seed=9)
    subtasks = np.array([0, 1, 0, 1, 1])
    layers = None if rule is None else LayerRule.of(None, {"mlp": 2.0, "last:1": 0.5})
    factors = (layers or LayerRule()).factors([n for n, _ in net.named_parameters()])

    def vectors(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([torch.cat([(factors[n] * g).flatten() for n, g in row.items()]) for row in rows])

    unit = torch.nn.functional.normalize(vectors(gradients(net, target)), dim=1)
    toward = torch.stack([unit[torch.from_numpy(subtasks == k)].mean(0) for k in (0, 1)])
    wanted = vectors(gradients(net, samples, adam))
    found = mean_directions(scorer(net), target, subtasks, layers=layers)
    dots, sqnorm = exact_dots(scorer(net), samples, found, adam=adam, layers=layers)
    assert error(dots, wanted @ toward.T) < 1e-4
    np.testing.assert_allclose(sqnorm, wanted.square().sum(1).numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            (["q_prj"], None),
            r"layers: 'q_prj' matches no trained parameter \(did you mean 'q_proj'\?\); valid: first:N",
        ),
        ((["last:3"], None), "layers: 'last:3': there are trained parameters in 2 numbered layers"),
        ((None, {"norms": 2.0}), r"layer_weights: 'norms' matches no trained parameter \(did you mean 'norm'\?\)"),
        ((["lm_head"], {"q_proj": 2.0}), "layer_weights: 'q_proj' matches no trained parameter; valid"),
        ((None, {"norm": 0}), "layer_weights: norm: expected a number > 0, got 0"),
        (("q_proj", None), r"layers: expected a list of patterns, got the text 'q_proj'; write \[q_proj\]"),
    ],
)
def test_patterns_that_mean_nothing(rule: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        find_targets(families.model("llama"), LayerRule.of(*rule))


def test_parameters_that_no_tap_covers_are_named_unless_left_out() -> None:
    net = families.model("llama")
    net.model.register_parameter("soft_prompt", torch.nn.Parameter(torch.zeros(2, 16)))
    with pytest.raises(UserError, match=r"no tap covers the trained parameter model\.soft_prompt; covered are"):
        find_targets(net)
    assert find_targets(net, LayerRule.of(["layers"], None))


def test_a_layer_that_is_never_called_is_named() -> None:
    net = families.model("llama")
    net.model.layers[1].mlp.unused = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"no gradient reaches.*: model\.layers\.1\.mlp\.unused\.weight, .*a pattern"):
        scorer(net).gradient_features(pool(2), proj_dim=PROJ_DIM, seed=SEED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_that_runs_again_may_hold_other_taps_and_recompute(reentrant: bool) -> None:
    """Attention sinks: their module has q, k, v and o inside; a parameter of the checkpointed layer itself too."""
    net, samples = families.model("gpt_oss"), pool()
    net.model.layers[0].register_parameter("gain", torch.nn.Parameter(torch.tensor(0.7)))
    plain = type(net.model.layers[0])

    class Scaled(plain):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return super().forward(hidden_states, **kwargs) * self.gain

    net.model.layers[0].__class__ = Scaled
    truth = projected(gradients(net, samples, "adam_less"))
    net.enable_input_require_grads()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = scorer(net.train()).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED, adam="adam_less")
    assert error(got, truth) < 1e-5


def test_packed_samples_of_a_module_that_runs_again() -> None:
    net, samples = families.model("apertus"), pool()
    truth = projected(gradients(net, samples))
    got = scorer(net, packing=True).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED)
    assert error(got, truth) < 1e-5


def test_a_layer_that_is_used_twice_is_named() -> None:
    net = families.model("llama")
    net.model.layers[1].mlp = net.model.layers[0].mlp
    with pytest.raises(UserError, match=r"used several times in one forward: model\.layers\.0\.mlp"):
        scorer(net).gradient_features(pool(2), proj_dim=PROJ_DIM, seed=SEED)


class GroupedRMSNorm(torch.nn.Module):
    """Called like the others, but each half of the input is normalised by itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.linspace(0.5, 1.5, size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.unflatten(-1, (2, -1))
        return self.weight * (halves * torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)


class GatedRMSNorm(torch.nn.RMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x * gate)


def test_a_norm_is_what_differentiates_like_one() -> None:
    for good in (torch.nn.LayerNorm(8), torch.nn.RMSNorm(8), families.model("gemma").model.norm):
        assert kind_of(good) == kind_of(good.to(torch.bfloat16)) == "norm"
    assert kind_of(GroupedRMSNorm(8)) is None and kind_of(GatedRMSNorm(8)) is None
    net, samples = families.model("llama"), pool(3)
    net.model.norm = GroupedRMSNorm(16)
    truth = projected(gradients(net, samples))
    assert error(scorer(net).gradient_features(samples, proj_dim=PROJ_DIM, seed=SEED), truth) < 1e-5


def test_a_parameter_that_its_module_hands_out_is_named() -> None:
    """Its sample's gradient is made outside the module, where it cannot be told from the others'."""
    net = families.model("gpt_neox_japanese")
    with pytest.raises(UserError, match=r"the module of .*\.attention\.dense_bias returns it, and another uses it"):
        scorer(net).gradient_features(pool(2), proj_dim=PROJ_DIM, seed=SEED)
    rest = LayerRule.of(["!dense_bias"], None)
    assert len(scorer(net).gradient_features(pool(2), proj_dim=PROJ_DIM, seed=SEED, layers=rest)) == 2


def test_layers_that_have_tokens_first_are_named() -> None:
    from dataflex.scoring.gradients.rerun import Places

    places = Places(3, 42, torch.arange(4) * 14)
    with pytest.raises(UserError, match=r"layer of w sees \(14, 3, 8\), tokens first, for 3 rows of 14 tokens"):
        places.mask(torch.zeros(14, 3, 8), 0, "w")
    kept = places.mask(torch.ones(3, 14, 8), 1, "w")
    assert kept[1].all() and not kept[0].any() and not kept[2].any()
