"""`dataflex-cli embed`: what a selector by embeddings goes by, in files, without training.

The pool's embeddings are kept in shards as a run keeps them; scores.json names their folder, and no second copy is
made. Beside the scores, which are those of `dataflex-cli score`, `select` and other tools find the target's embeddings,
the samples nearest to each of them and, of a selector that draws by probabilities, these.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config import Config
from dataflex.config.components import component_params
from dataflex.config.rules.streaming import needs_known_data
from dataflex.core.clock import SCORE
from dataflex.core.registry import REGISTRY
from dataflex.driver import scores
from dataflex.driver.estimate import estimate
from dataflex.driver.scoring import Passing, columns_of, opened, without_steps, write_files
from dataflex.driver.setup import Inputs, with_components
from dataflex.scoring.decide.neighbours import nearest
from dataflex.scoring.decide.table import ScoreTable, on_main
from dataflex.scoring.kept import neighbour_files as files
from dataflex.utils import dist
from dataflex.utils.errors import UserError
from dataflex.utils.errors import nearest as nearest_name
from dataflex.utils.logging import logger
from dataflex.utils.run_lock import held

KEY = "embed_neighbours"
# Of a selector that sets no limit of its own.
NEIGHBOURS = 1000
# Numbers of a table that is written: 1 GiB.
MOST_SCORES = 1 << 28


def embed(cfg: Config) -> None:
    """Embed as ``cfg`` says, under a started process group; a collective."""
    needs_known_data(cfg, "embed")
    cfg = with_components(without_steps(cfg))
    _check_keys(cfg)
    with held(Path(cfg.output.output_dir)) if not cfg.score.dry_run else nullcontext():
        made = opened(cfg, check=_check_count)
        if cfg.score.dry_run:
            estimate(made.inputs, made.engine, training=False)
        else:
            _write(made)


def _check_keys(cfg: Config) -> None:
    """UserError for a component without embeddings, and for a key of other passes."""
    valid = [name for name in REGISTRY.names("selector") if getattr(REGISTRY.get("selector", name), "embeds", False)]
    if "select" not in cfg.flex.kinds:
        raise UserError(f"embed: needs train_type: dynamic_select with a component_name; valid: {', '.join(valid)}")
    asked, name = str(cfg.flex.component("select")), component_params(cfg.flex, "select")[0]
    if name not in valid:
        raise UserError(
            f"component_name: selector '{asked}' goes by no embeddings{nearest_name(asked, valid)}; "
            f"valid: {', '.join(valid)}"
        )
    if cfg.score.score_token_losses:
        raise UserError("score_token_losses: is of `dataflex-cli score`; embed makes no losses, drop it")


def _check_count(inputs: Inputs) -> None:
    """UserError where more neighbours are asked for than there are samples."""
    asked, size = inputs.cfg.score.embed_neighbours, inputs.data.train.size
    if asked is not None and size is not None and asked > size:
        raise UserError(f"{KEY}: {asked:,} samples near each of the target's are asked for, the pool has {size:,}")


def _write(made: Passing) -> None:
    selector, clock, folder, size = made.selector, made.engine.run.clock, made.folder, len(made.pool)
    count = made.inputs.cfg.score.embed_neighbours or min(selector.neighbours or NEIGHBOURS, size)
    clock.start()
    with clock.part(SCORE):
        found = selector.embeddings.embed()
        assert found is not None
        near = nearest(found.pool, found.target, count, made.engine.scorer.device)
        drawn = selector.probabilities_of(found) if selector.draws else None
        columns = columns_of(selector)
        if drawn is None:
            table, columns = _scores(selector.table_of(found), columns)
        else:
            table = drawn.astype(np.float32)[:, None]
    if dist.is_main():
        scores.drop_beside(folder, files.NAMES)  # the new ones come after the scores that say what they are of
    facts = write_files(made, table, **columns)
    if facts is not None:
        paths = [files.write_target(folder, found.target), files.write_top_indices(folder, near.ids)]
        logger.info(f"embeddings of {size:,} samples, {found.pool.width} numbers each: {facts.features}")
        logger.info(f"of {len(near.ids):,} samples of the target their {count:,} nearest: {paths[-1]}")
        if drawn is not None:
            paths.append(files.write_probabilities(folder, drawn))
            logger.info(f"probabilities, {np.count_nonzero(drawn):,} of them not 0: {paths[-1]}")
        scores.name_beside(folder, paths)
        logger.info(f"scores, and what all is of: {folder / scores.TABLE}, {scores.FACTS}")
        logger.info(facts.cost.line)
    dist.barrier()


def _scores(
    table: ScoreTable, columns: dict[str, Any], most: int = MOST_SCORES
) -> tuple[NDArray[np.float32] | None, dict[str, Any]]:
    """What is written of a table, float32 [N, M] or [N, 1] on rank 0, and what is said of its columns; a collective.

    Of more than ``most`` scores each sample's largest.
    """
    size, width = table.shape
    if size * width <= most:
        return on_main(table), columns
    logger.warning(
        f"{scores.TABLE}: {size:,} x {width:,} scores are too many for a table: it has each sample's largest, and no "
        f"rule shares picks by it; choose by {files.TOP_INDICES}, or embed with per: subtask"
    )
    return on_main(table, lambda block: np.asarray(block.max(axis=1, keepdims=True))), {}
