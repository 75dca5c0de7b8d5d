"""Static weights: what the samples, their domains and the label tokens bring, before any weighter is asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex.core.plan import Floats
from dataflex.core.weights import StaticWeights
from dataflex.data.encoding.encode import IGNORE_INDEX
from dataflex.data.pool import Pool, TrainingPool
from dataflex.data.sources.scan import check_weights
from dataflex.data.weight_file import read_array
from dataflex.utils.errors import UserError, cut, nearest
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config.sections.weighting import WeightingSection


def static_weights(
    keys: WeightingSection, pool: TrainingPool, tokenizer: Any, vocabulary: int | None, device: torch.device
) -> StaticWeights:
    """What the keys and the pool's own weights say. vocabulary: columns of the logits, None where unknown."""
    if keys.sample_weight_as != "loss" and pool.sample_weights is None:
        raise UserError(f"sample_weight_as: {keys.sample_weight_as}: the training samples have no sample_weight")
    loss = pool.sample_weights if keys.sample_weight_as != "probability" else None
    if keys.domain_weights is not None:
        domains = domain_multipliers(keys.domain_weights, pool.domain_names)
        domains = domains[pool.domain_ids] if isinstance(pool, Pool) else domains
        loss = domains if loss is None else loss * domains
    if loss is not None and not loss.any():
        raise UserError("sample_weight: every sample weighs 0")
    classes = None
    if keys.class_weights is not None:
        if vocabulary is None:
            raise UserError("class_weights: the model does not say how many tokens its output has")
        classes = class_weights(keys.class_weights, vocabulary, tokenizer).to(device)
    draw = draw_probabilities(keys, pool) if keys.draws and isinstance(pool, Pool) else None
    return StaticWeights(loss, draw, keys.corrected and draw is not None, classes, pool.weighs_tokens)


def domain_multipliers(weights: Mapping[str, float], names: Sequence[str]) -> Floats:
    """float64 [domains]; 1 where a domain is not named. UserError for names that are no domain."""
    for name in weights:
        if name not in names:
            raise UserError(f"domain_weights: unknown domain '{name}'{nearest(name, names)}; valid: {', '.join(names)}")
    return np.array([weights.get(name, 1.0) for name in names], dtype=np.float64)


def draw_probabilities(keys: WeightingSection, pool: Pool) -> Floats:
    """The probability of each sample in a draw, float64 [pool] of sum 1.

    sample_weight, where it is a probability, times the preset: 1 / the samples of the domain (inverse_domain) or of
    the class (inverse_class: the samples with the same answer), or n_d^(t - 1) for a domain of n_d samples
    (temperature t: 1 draws domains by size, 0 evenly).
    """
    weights = np.ones(len(pool))
    if keys.sample_weight_as != "loss" and pool.sample_weights is not None:
        weights = weights * pool.sample_weights
    if keys.sampling == "inverse_class":
        classes = answer_classes(pool)
        sizes = np.bincount(classes)
        if len(sizes) == len(pool):
            logger.warning("sampling: inverse_class: no two samples have the same answer, so every draw is even")
        weights = weights / sizes[classes]
    elif keys.sampling is not None:
        power = 1.0 if keys.sampling == "inverse_domain" else 1.0 - keys.sampling_temperature
        weights = weights / (pool.domain_sizes().astype(np.float64) ** power)[pool.domain_ids]
    total = float(weights.sum())
    if not (np.isfinite(total) and total > 0):
        raise UserError(
            f"sample_weight_as: {keys.sample_weight_as}: the weights sum to {total:g}; nothing can be drawn"
        )
    return weights / total


def answer_classes(pool: Pool) -> np.ndarray:
    """The class of each sample, int64 [pool]: samples with the same trained tokens are of one class."""
    numbers: dict[bytes, int] = {}
    classes = np.empty(len(pool), dtype=np.int64)
    for index in range(len(pool)):
        labels = np.asarray(pool[index]["labels"], dtype=np.int64)
        answer = hashlib.blake2b(labels[labels != IGNORE_INDEX].tobytes(), digest_size=16).digest()
        classes[index] = numbers.setdefault(answer, len(numbers))
    return classes


def class_weights(given: str | Mapping[str, float], vocabulary: int, tokenizer: Any) -> Tensor:
    """float32 [vocabulary]: the weight of each label token, 1 where it is not named.

    given: {token id or text of one token: weight}, a .json file of such a mapping, or a .npy file [vocabulary].
    """
    if isinstance(given, str):
        if Path(given).suffix == ".npy":
            array = check_weights(read_array(given, "class_weights"), vocabulary, f"class_weights: {given}")
            return torch.from_numpy(array.astype(np.float32))
        try:
            loaded = json.loads(Path(given).expanduser().read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise UserError(f"class_weights: {given} cannot be read as JSON: {cut(str(exc), 200)}") from None
        if not isinstance(loaded, dict):
            return torch.from_numpy(check_weights(loaded, vocabulary, f"class_weights: {given}")).float()
        check_weights(list(loaded.values()), len(loaded), f"class_weights: {given}")
        given = {str(name): float(weight) for name, weight in loaded.items()}
    weights = torch.ones(vocabulary)
    for name, weight in given.items():
        weights[_token_id(name, vocabulary, tokenizer)] = weight
    return weights


def _token_id(name: str, vocabulary: int, tokenizer: Any) -> int:
    if re.fullmatch("-?[0-9]{1,18}", name):
        token = int(name)
        if not 0 <= token < vocabulary:
            raise UserError(f"class_weights: token id {name} is out of range; valid: 0 to {vocabulary - 1}")
        return token
    if not callable(tokenizer):
        raise UserError(f"class_weights: '{name}' needs a tokenizer; without one name token ids")
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"class_weights: '{name}' is {len(ids)} tokens; a class is one token: a token's text or its id")
    return int(ids[0])
