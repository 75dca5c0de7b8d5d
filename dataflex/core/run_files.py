"""The files of a run folder: what each is, and which of them a run that starts over removes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFile:
    """Files of a run folder that match ``pattern``. cleared: they are one run's, and go when another starts there."""

    pattern: str
    what: str
    cleared: bool = True


RESULTS = "all_results.json"  # written last: a folder that has it holds a finished run
EVALUATION = "eval_results.json"
RUN_FILES = (
    RunFile("config.yaml", "the effective configuration: trained again, it is the same run", cleared=False),
    RunFile(RESULTS, "loss, speed, and where the time went"),
    RunFile(EVALUATION, "losses by domain, of dataflex-cli eval"),
    RunFile("trainer_log.jsonl", "a line for each logged step"),
    RunFile("trainer_state.json", "the same with the step and the epoch, as transformers has it"),
    RunFile("training_loss.png", "loss over steps"),
    RunFile("decisions/*.json", "what was decided, and from what"),
    RunFile("decisions/*.parquet", "every sample of the pool: score, rank, picked"),
    RunFile("weights.jsonl", "the samples' weights in each logged step"),
    RunFile("*_weights.jsonl", "the mixer's proportions, and what each domain has given"),
    RunFile("*_average_weights.json", "the domains' mean weights: the result"),
    RunFile("README.md", "the model card"),
    RunFile("adapter_config.json", "the adapter: what it adapts"),
    RunFile("adapter_model.safetensors", "the adapter: trained weights"),
    RunFile("config.json", "the model: architecture"),
    RunFile("generation_config.json", "the model: how it generates"),
    RunFile("model*.safetensors*", "the model: weights"),
    RunFile("tokenizer*", "the tokenizer", cleared=False),
    RunFile("special_tokens_map.json", "the tokenizer: special tokens", cleared=False),
    RunFile("added_tokens.json", "the tokenizer: added tokens", cleared=False),
    RunFile("vocab.*", "the tokenizer: vocabulary", cleared=False),
    RunFile("merges.txt", "the tokenizer: merges", cleared=False),
    RunFile("*.model", "the tokenizer: sentencepiece model", cleared=False),
    RunFile("chat_template*", "the tokenizer: chat template"),
    RunFile("additional_chat_templates", "the tokenizer: further chat templates", cleared=False),
    RunFile("checkpoint-*", "the state after that step"),
    RunFile("zero_to_*.py", "DeepSpeed's scripts: one file of weights out of a checkpoint"),
    RunFile("latest", "which checkpoint is the newest"),
    RunFile("scores", "scores of the passes over the pool, in shards", cleared=False),
    RunFile("features", "features of the pool, in shards", cleared=False),
    RunFile("embeddings", "embeddings of the pool, in shards", cleared=False),
    RunFile("cache", "files of the components' own", cleared=False),
)


def cleared() -> tuple[str, ...]:
    """Patterns of what goes when a run starts over."""
    return tuple(dict.fromkeys(file.pattern.split("/")[0] for file in RUN_FILES if file.cleared))


def written(folder: Path, more: Sequence[RunFile] = ()) -> Iterator[tuple[RunFile, list[str]]]:
    """(file, names) of what is there of `RUN_FILES` and ``more``, each name once, relative to ``folder``."""
    seen: set[Path] = set()
    for file in (*RUN_FILES, *more):
        found = [path for path in folder.glob(file.pattern) if path not in seen]
        seen |= set(found)
        if found:
            yield file, [path.relative_to(folder).as_posix() for path in sorted(found, key=_by_number)]


def _by_number(path: Path) -> tuple[int, str]:
    """checkpoint-20 comes before checkpoint-100."""
    digits = "".join(filter(str.isdigit, path.name))
    return int(digits or 0), path.name
