"""From the configuration to the pool: read, check, tokenise, choose, split, and count everything."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.data.cache import cached
from dataflex.data.encoding.encode import tokenizer_identity
from dataflex.data.encoding.tokenize import Encoder, pack_blocks, tokenise
from dataflex.data.held_out import check_subtasks, held_out, part_of
from dataflex.data.pool import Pool, TrainingPool
from dataflex.data.report import DataReport, DomainReport
from dataflex.data.saved import load_or_make
from dataflex.data.sources.convert import Converter
from dataflex.data.sources.info import DatasetInfo, find_dataset_dir, read_dataset_infos
from dataflex.data.sources.origin import Origin, origin_of
from dataflex.data.sources.source import fingerprint_of, read_source
from dataflex.data.streams.stream_pool import load_streams
from dataflex.data.weight_file import WeightFile, token_weights
from dataflex.utils.dist import is_main, main_first
from dataflex.utils.errors import UserError
from dataflex.utils.logging import logger

if TYPE_CHECKING:
    from datasets import Dataset

    from dataflex.config import Config


@dataclass(frozen=True)
class LoadedData:
    """The pools; with ``streaming`` the one to train on is a `StreamPool`.

    ``eval``'s domains are the evaluation datasets, or with val_size the training domains.
    """

    train: TrainingPool
    eval: Pool | None
    report: DataReport


@dataclass(frozen=True)
class Domain:
    """One tokenised dataset without its unusable rows; ``digests`` (int64 [N]) find equal samples.

    rows: int64 [N], the raw rows of the samples; None for packed blocks.
    weights: float64 [N], the samples' own, or None.
    """

    name: str
    dataset: Dataset
    lengths: np.ndarray
    digests: np.ndarray
    fingerprint: str
    report: DomainReport
    rows: np.ndarray | None
    weights: np.ndarray | None = None
    origin: Origin | None = None


def load_data(cfg: Config, tokenizer: Any, eval_column: str | None = None) -> LoadedData:
    """Read and tokenise everything that ``cfg.data`` names; rank 0 first, the others from its cache.

    eval_column: a column that the evaluation samples keep, as text; those of a part held out bring it, and all where
    there is nothing else to evaluate on.
    Raises UserError naming file and row for data that cannot be used as it is.
    """
    data = cfg.data
    if data.val_size and data.eval_dataset:
        raise UserError("val_size: cannot be used together with eval_dataset")
    if data.streaming:
        streams, evaluation = load_streams(cfg, tokenizer), _evaluation(cfg, tokenizer, eval_column)
        report = DataReport(eval=[d.report for d in evaluation], streams=[s.line for s in streams.streams])
        return LoadedData(streams, _pool(evaluation) if evaluation else None, report)
    with main_first(), _bars_on_terminals_only():
        loader = _Loader(cfg, tokenizer, weighted=True, kept_needed=not data.val_size)
        train = loader.domains(data.dataset, "dataset", None if data.eval_dataset else eval_column)
    evaluation = _evaluation(cfg, tokenizer, eval_column)
    report = DataReport([d.report for d in train], [d.report for d in evaluation])
    if evaluation:
        seen = np.unique(np.concatenate([d.digests for d in train]))
        report.shared_rows = int(sum(np.isin(d.digests, seen).sum() for d in evaluation))
        return LoadedData(_pool(train), _pool(evaluation), report)
    if not data.val_size:
        return LoadedData(_pool(train), None, report)
    whole = _pool(train)
    chosen = held_out(whole, data.val_size, cfg.train.seed)
    report.held_out = len(chosen)
    rest = np.setdiff1d(np.arange(len(whole)), chosen)
    tag = [data.val_size, cfg.train.seed]
    evaluated = part_of(whole, chosen, ["eval", *tag])
    if eval_column is not None:
        check_subtasks(evaluated, eval_column, loader.dataset_dir)
    return LoadedData(part_of(whole, rest, ["train", *tag]), evaluated, report)


def _evaluation(cfg: Config, tokenizer: Any, kept: str | None) -> list[Domain]:
    """The domains of eval_dataset, none where there is none. kept: a column that stays, as text."""
    if not cfg.data.eval_dataset:
        return []
    with main_first(), _bars_on_terminals_only():
        return _Loader(cfg, tokenizer).domains(cfg.data.eval_dataset, "eval_dataset", kept)


def load_pool(cfg: Config, tokenizer: Any, names: Sequence[str], key: str) -> Pool:
    """A pool of other datasets of dataset_info.json (for instance mixer_eval_dataset); ``key`` names it."""
    with main_first(), _bars_on_terminals_only():
        return _pool(_Loader(cfg, tokenizer).domains(names, key))


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    import datasets

    silence = datasets.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


class _Loader:
    """``weighted``: with the weights of samples and tokens, which only training uses.

    kept_needed: whether every row must have the column that is kept.
    """

    def __init__(self, cfg: Config, tokenizer: Any, weighted: bool = False, kept_needed: bool = True) -> None:
        self.cfg, self.kept_needed = cfg, kept_needed
        data = cfg.data
        if cfg.method.stage == "pt" and cfg.packs and data.sample_weight is not None:
            raise UserError("sample_weight: a packed block of stage pt has no one weight; set packing: false")
        self.encoder = Encoder.of(cfg, tokenizer, token_weights(cfg) if weighted else None)
        self.dataset_dir = find_dataset_dir(data.dataset_dir, cfg.source)
        self.weight_column = data.sample_weight if weighted else None
        self.weight_file = None
        if self.weight_column is not None and self.weight_column.endswith(".npy"):
            self.weight_file, self.weight_column = WeightFile(self.weight_column), None

    def domains(self, names: Sequence[str], key: str, kept: str | None = None) -> list[Domain]:
        if kept is not None and self.encoder.settings.packed_blocks:
            raise UserError("subtask_column: a packed block of stage pt has no one value; set packing: false")
        if not names:
            raise UserError(f"{key}: names no dataset; valid are the entries of {self.dataset_dir}")
        infos = read_dataset_infos(names, self.dataset_dir, key)
        for info in infos:
            if info.num_samples == 0:
                raise UserError(f"{info.where}.num_samples: {key} cannot do without rows, and 0 are drawn")
        found = [self._domain(info, kept) for info in infos]
        if self.weight_file is not None:
            self.weight_file.check_used()
        return found

    def _domain(self, info: DatasetInfo, kept: str | None) -> Domain:
        data = self.cfg.data
        report = DomainReport(info.name)
        tokens = self.encoder.settings.token_weights
        column = None if tokens is None else tokens.column
        stage = self.encoder.settings.stage
        source = read_source(info, Converter(info, stage, self.weight_column, column, kept, self.kept_needed))
        report.read = len(source)
        rows, choice = self._choose(source, info, report)
        weights = None if self.weight_file is None else self.weight_file.take(len(source), rows, info.name)
        fingerprint = fingerprint_of("tokens", source._fingerprint, choice, self.encoder.identity())
        tokens = self._tokens(source.select(rows), info.name, fingerprint, [source._fingerprint, *choice])
        digests = _column(tokens, "digest")
        report.truncated = int(_column(tokens, "truncated").sum())
        report.duplicates = len(digests) - len(np.unique(digests))
        if self.encoder.settings.packed_blocks:
            tokens = pack_blocks(tokens, data.cutoff_len, fingerprint)
        made_from = None if self.encoder.settings.packed_blocks else rows
        if weights is not None:
            fingerprint = fingerprint_of(fingerprint, hashlib.sha256(weights.tobytes()).hexdigest())
        elif self.weight_column is not None:
            weights = _column(tokens, "sample_weight").astype(np.float64)
        domain = self._finish(tokens, info, fingerprint, report, made_from, weights, kept)
        return replace(domain, origin=origin_of(info, source))

    def _choose(self, source: Dataset, info: DatasetInfo, report: DomainReport) -> tuple[np.ndarray, list[Any]]:
        """The rows to tokenise, and what decided on them."""
        usable = _usable_rows(source, info, report)
        choice: list[Any] = []
        rows = usable
        if info.num_samples is not None:
            seed = self.cfg.train.seed
            rows = _draw(usable, info.num_samples, seed, info.name)
            choice += ["num_samples", info.num_samples, seed, info.name]
        if self.cfg.data.max_samples is not None:
            rows = rows[: self.cfg.data.max_samples]
            choice += ["max_samples", self.cfg.data.max_samples]
        report.not_chosen = len(usable) - len(np.unique(rows))
        return rows, choice

    def _tokens(self, rows: Dataset, name: str, fingerprint: str, content: list[Any]) -> Dataset:
        data, encoder = self.cfg.data, self.encoder

        def make(folder: Path) -> Dataset:
            return tokenise(rows, encoder, name, data.preprocessing_num_workers, folder)

        if data.tokenized_path is None:
            return cached(fingerprint, make, overwrite=data.overwrite_cache and is_main())
        settings = encoder.settings
        made_from = {
            "the data": fingerprint_of(content),
            "the tokenizer": tokenizer_identity(encoder.tokenizer),
            "template": encoder.template.identity if encoder.template is not None else "",
            "stage": settings.stage,
            "cutoff_len": str(settings.cutoff_len),
            "train_on_prompt": str(settings.train_on_prompt),
            "mask_history": str(settings.mask_history),
            "packing": str(settings.packed_blocks),
        }
        if settings.token_weights is not None:
            made_from["token weights"] = fingerprint_of(settings.token_weights.parts())
        return load_or_make(Path(data.tokenized_path), name, fingerprint, made_from, make, data.overwrite_cache)

    def _finish(
        self,
        tokens: Dataset,
        info: DatasetInfo,
        fingerprint: str,
        report: DomainReport,
        rows: np.ndarray | None,
        weights: np.ndarray | None,
        kept_column: str | None,
    ) -> Domain:
        trained = _column(tokens, "trained")
        kept = np.flatnonzero(trained > 0)
        report.all_masked = len(trained) - len(kept)
        if not len(kept):
            raise UserError(
                f"{info.where}: all {len(trained)} samples are masked: nothing to train on is left within "
                f"cutoff_len {self.cfg.data.cutoff_len}"
            )
        lengths = _column(tokens, "length")[kept]
        report.measure(lengths, trained[kept])
        digests = _column(tokens, "digest")[kept]
        if report.all_masked:
            tokens = tokens.select(kept)
        of_tokens = ["token_weight"] if self.encoder.settings.token_weights is not None else []
        dataset = tokens.select_columns(["input_ids", "labels", *of_tokens, *(["kept"] if kept_column else [])])
        if kept_column:
            dataset = dataset.rename_column("kept", kept_column)
        kept_rows, kept_weights = (None if values is None else values[kept] for values in (rows, weights))
        return Domain(info.name, dataset, lengths, digests, fingerprint, report, kept_rows, kept_weights)


def _usable_rows(source: Dataset, info: DatasetInfo, report: DomainReport) -> np.ndarray:
    import pyarrow.compute as pc

    is_bad = pc.not_equal(source.data.column("problem"), "").to_numpy()
    for row in source.select_columns(["problem", "where"]).select(np.flatnonzero(is_bad)):
        report.drop(row["problem"], row["where"])
    if is_bad.all():
        raise UserError(f"{info.where}: none of its {len(source)} rows can be used: {report.reasons}")
    if report.dropped:
        logger.warning(f"{info.name}: {int(is_bad.sum())} of {len(source)} rows dropped: {report.reasons}")
    usable: np.ndarray = np.flatnonzero(~is_bad)
    return usable


def _draw(rows: np.ndarray, count: int, seed: int, name: str) -> np.ndarray:
    """``count`` random rows in the order of the file; above their number, rows repeat."""
    rng = np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()[:8]])
    picks = rng.permutation(len(rows))[:count]
    more = rng.integers(len(rows), size=count - len(picks))
    drawn: np.ndarray = rows[np.sort(np.concatenate([picks, more]))]
    return drawn


def _column(dataset: Dataset, name: str) -> np.ndarray:
    assert dataset._indices is None, "columns are read from the table itself"
    values: np.ndarray = dataset.data.column(name).to_numpy()
    return values


def _pool(domains: list[Domain]) -> Pool:
    from datasets import concatenate_datasets

    return Pool(
        dataset=concatenate_datasets([d.dataset for d in domains]) if len(domains) > 1 else domains[0].dataset,
        domain_ids=np.repeat(np.arange(len(domains), dtype=np.int32), [len(d.lengths) for d in domains]),
        domain_names=[d.name for d in domains],
        lengths=np.concatenate([d.lengths for d in domains]),
        fingerprint=fingerprint_of("pool", [[d.name, d.fingerprint] for d in domains]),
        rows=None if any(d.rows is None for d in domains) else np.concatenate([d.rows for d in domains]),
        sample_weights=None if domains[0].weights is None else np.concatenate([d.weights for d in domains]),
        origins=[d.origin for d in domains],
    )
