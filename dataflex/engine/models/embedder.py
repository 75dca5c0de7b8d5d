"""A frozen model of its own that embeds samples: the run's tokens where it has the same tokenizer, else their text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dataflex.config.paths import resolve
from dataflex.data.encoding.collate import Collator
from dataflex.data.encoding.encode import IGNORE_INDEX, tokenizer_identity
from dataflex.engine.folder.identity import bits_digest, settings_digest
from dataflex.engine.models.unpartitioned import whole, without_values
from dataflex.scoring.batches import Ids
from dataflex.scoring.passes.embed_pass import embeddings
from dataflex.scoring.passes.hidden_states import check_layer
from dataflex.scoring.scorer import Scorer
from dataflex.utils import dist
from dataflex.utils.errors import UserError, brief
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from dataflex.config.schema import ModelSection

KEY = "embedding_model"
# What tokenizers say that know no longest text.
_NO_LIMIT = 10**9


class Embedder:
    """The model at ``source``, a folder or a name of the hub; its weights are loaded when they are first needed.

    Each rank has all of it, in eval mode and in the dtype of the model in training, and embeds its share of the
    batches. scorer: of the run, for its device, token budget and count of scored samples. tokenizer: the run's. dtype:
    instead of that of the model in training, where there is none.
    A sample's tokens are taken as they are where both vocabularies are the same. Else its text is what the run's
    tokenizer makes of them without special tokens, tokenised anew with this model's own special tokens around it. Both
    are cut to what the model takes. UserError, in one line, for what cannot be done.
    """

    def __init__(
        self, source: str, scorer: Scorer, tokenizer: Any, model: ModelSection, dtype: torch.dtype | None = None
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.source = str(resolve(source)) if source.startswith(("configs/", "~")) else source
        self._options = {"trust_remote_code": model.trust_remote_code, "cache_dir": model.cache_dir}
        self._run, self._dtype, self._said = scorer, dtype, False
        self._module: nn.Module | None = None
        self.config = self._read("model config", lambda: AutoConfig.from_pretrained(self.source, **self._options))
        self.tokenizer = self._read("tokenizer", lambda: AutoTokenizer.from_pretrained(self.source, **self._options))
        text = self.config.get_text_config()
        if getattr(self.config, "is_encoder_decoder", False):
            raise UserError(f"{KEY}: '{source}' has an encoder and a decoder; valid: a model of one of them")
        if len(self.tokenizer) > text.vocab_size:
            raise UserError(
                f"{KEY}: '{source}': its tokenizer has {len(self.tokenizer)} tokens, its embeddings {text.vocab_size}"
            )
        if not hasattr(tokenizer, "decode"):
            raise UserError(f"{KEY}: needs the run's tokenizer, to turn its tokens into text (tokenizer=...)")
        self.width = int(text.hidden_size)
        self._theirs = tokenizer
        self.same = tokenizer.get_vocab() == self.tokenizer.get_vocab()
        positions = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
        self.longest = min(positions, self.tokenizer.model_max_length, _NO_LIMIT)

    def check(self, pooling: str, layer: int, source: str) -> None:
        """UserError, in the name of ``source``, for a pooling or a layer that it cannot have."""
        from transformers import AutoModel

        if pooling == "trained" and not self.same:
            raise UserError(
                f"{source}: pooling: which tokens are trained is not known to '{self.source}', whose tokenizer is "
                "another; valid: weighted, mean, last"
            )
        with without_values():
            remote = self._options["trust_remote_code"]
            make = lambda: AutoModel.from_config(self.config, trust_remote_code=remote)  # noqa: E731
            check_layer(self._read("model", make), layer, source)

    def embeddings(self, dataset: Any, ids: Ids, *, pooling: str, layer: int) -> NDArray[np.float32]:
        """Unit embeddings of the samples ``ids``, float32 [n, hidden size]; a collective."""
        samples = self._encoded(dataset, ids)
        scorer = self._scorer()
        scorer.watch = self._run.watch
        return embeddings(scorer, samples, pooling=pooling, layer=layer, unit=True, decoder=self.module)

    def identity(self) -> dict[str, str]:
        """Parts of a fingerprint: its weights and settings, and how samples become its tokens."""
        state = [*self.module.named_parameters(), *self.module.named_buffers()]
        digest = hashlib.sha256(repr([(name, bits_digest(value)) for name, value in state]).encode())
        digest.update(settings_digest(self.module).encode())
        tokens = tokenizer_identity(self.tokenizer)
        if not self.same:
            tokens += tokenizer_identity(self._theirs)
        return {KEY: digest.hexdigest()[:16], "tokens": hashlib.sha256(tokens.encode()).hexdigest()[:16]}

    @property
    def module(self) -> nn.Module:
        """Loaded at the first call."""
        if self._module is None:
            self._module = self._load()
        return self._module

    def close(self) -> None:
        """Give the weights' memory back."""
        self._module = None

    def _load(self) -> nn.Module:
        from transformers import AutoModel

        dtype = self._dtype or next(self._run.engine.module.parameters()).dtype
        with whole():
            load = lambda: AutoModel.from_pretrained(self.source, dtype=dtype, **self._options)  # noqa: E731
            model: Any = dist.together(lambda: self._read("fitting weights", load))
        model.requires_grad_(False).eval()
        model.config.use_cache = False
        how = "its tokens are the run's" if self.same else "the samples' texts are tokenised anew"
        logger.info(f"{KEY}: {self.source}, frozen, whole on each rank; {how}")
        return model.to(self._run.device)  # type: ignore[no-any-return]

    def _read(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # damaged files, unknown kinds: transformers has many words for them
            raise UserError(f"{KEY}: no {what} at '{self.source}': {brief(exc)}") from exc

    def _scorer(self) -> Scorer:
        pad = self.tokenizer.pad_token_id
        collator = Collator(0 if pad is None else pad)
        found = Scorer(_Frozen(self.module, self._run.device), collator, self._run.token_budget, _no_moments)
        found.tally = self._run.tally
        return found

    def _encoded(self, dataset: Any, ids: Ids) -> list[dict[str, list[int]]]:
        """The samples' tokens for this model, at least one each."""
        samples = [dataset[int(i)] for i in ids]
        if self.same:
            pairs = [(list(s["input_ids"]), list(s["labels"])) for s in samples]
        else:
            texts = [self._theirs.decode(list(s["input_ids"]), skip_special_tokens=True) for s in samples]
            found = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            pairs = [(list(tokens), [IGNORE_INDEX] * len(tokens)) for tokens in found]
        cut = sum(len(tokens) > self.longest for tokens, _ in pairs)
        if cut and not self._said:
            self._said = True
            logger.info(f"{KEY}: takes {self.longest:,} tokens: {cut:,} of {len(pairs):,} samples are cut, and so on")
        return [self._sample(*pair) for pair in pairs]

    def _sample(self, tokens: list[int], labels: list[int]) -> dict[str, list[int]]:
        if not tokens:
            tokens, labels = [self.tokenizer.pad_token_id or 0], [IGNORE_INDEX]
        return {"input_ids": tokens[: self.longest], "labels": labels[: self.longest]}


class _Frozen:
    """What a `Scorer` asks of an engine."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device

    def empty_partition_cache(self) -> None:
        """Nothing is partitioned."""


def _no_moments(names: Any) -> Any:
    raise AssertionError("a frozen model has no optimizer")
