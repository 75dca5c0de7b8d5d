"""One selector's picks: ``python one_selection.py JOB.json``, a process of its own.

The job has the run's config, the counts that are asked for, rounds and the file of the answer. The model is trained for
the warm-up's steps, as the run that trains on the picks does with the same seed; then the selector is asked.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

UNTIMED_STEPS = 3  # these allocate


def select(job: dict[str, Any]) -> dict[str, Any]:
    """The job's answer; under a started process group of this process alone.

    picks: {count: sample ids}. selection_seconds: of each round, a pass and its choice, the target's part included.
    choice_seconds: of a further choice from the same pass. step_seconds, step_tokens: medians over the warm-up's steps.
    """
    from dataflex.config import load_config
    from dataflex.driver.setup import build_engine, read_inputs, with_components

    cfg = with_components(load_config(job["config"], quiet=True))
    engine = build_engine(read_inputs(cfg))
    steps = _warm_up(engine, cfg.flex.warmup_step)
    selector, counts = engine.planner.selector, job["counts"]
    scored: list[int] = []
    engine.scorer.tally = lambda samples, *more: scored.append(scored.pop() + samples)
    seconds: list[float] = []
    for _ in range(job["rounds"]):
        selector.forget()
        scored.append(0)
        for kept in ("scores", "features", "embeddings"):
            shutil.rmtree(Path(cfg.output.output_dir) / kept, ignore_errors=True)
        started = time.monotonic()
        picks = {str(counts[0]): _ask(engine, selector, counts[0])}
        seconds.append(time.monotonic() - started)
    assert len(set(scored)) == 1, f"the rounds' passes went over {scored} samples"
    started = time.monotonic()
    picks |= {str(count): _ask(engine, selector, count) for count in counts}
    return {
        "picks": picks,
        "selection_seconds": seconds,
        "choice_seconds": (time.monotonic() - started) / len(counts),
        "samples_scored": scored[-1],
        "step_seconds": statistics.median(took for took, _ in steps),
        "step_tokens": statistics.mean(tokens for _, tokens in steps),
    }


def _warm_up(engine: Any, count: int) -> list[tuple[float, int]]:
    """Train ``count`` steps; seconds and tokens of each that is timed."""
    steps = []
    for batch in islice(engine.batches(), count):
        started = time.monotonic()
        engine.training_step(batch)
        steps.append((time.monotonic() - started, int(engine.run.pool.lengths[batch.sample_ids].sum())))
    return steps[UNTIMED_STEPS:] or steps


def _ask(engine: Any, selector: Any, count: int) -> list[int]:
    run = engine.run
    answer = selector.select(
        engine.module, step_id=run.step, num_samples=count, current_update_times=1, update_times=1, tokenizer=None
    )
    return [int(i) for i in answer]


def main(job_file: str) -> None:
    from process_group import end_process, start_process

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    start_process()
    answer = select(job)
    Path(job["answer"]).write_text(json.dumps({"job": job, **answer}), encoding="utf-8")
    end_process()


if __name__ == "__main__":
    main(sys.argv[1])
