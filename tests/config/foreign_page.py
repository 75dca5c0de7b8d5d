"""Writes docs/coming_from_llamafactory.md: python -m tests.config.foreign_page.

From the table of keys, and from what ``benchmarks/against_llamafactory.py --write`` kept.
"""

from __future__ import annotations

from pathlib import Path

from dataflex.config.foreign.keys import table
from dataflex.config.schema import SECTION_OF

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/coming_from_llamafactory.md"
MEASURED = "benchmarks/results/against_llamafactory_*.md"
HEAD = """\
# Coming from LLaMA-Factory

A LLaMA-Factory YAML of stage `pt` or `sft` is given to `dataflex-cli train` as it is, with `key=value` or
`--key value` after it. What of it is not done is refused in one line, and what makes no difference is ignored with a
note; a key that is `false` or `null` asks for nothing. This page is made from `configs/llamafactory/keys.yaml`
(`python -m tests.config.foreign_page`), which covers the arguments of LLaMA-Factory 0.9.5 and of transformers 5.

Where `per_device_train_batch_size` or `lr_scheduler_type` is not given, it is 8 and linear, and a note says so.
The steps of `num_train_epochs` and the learning rate of each are LLaMA-Factory's: an epoch is a whole number of steps.
Here each of them is of a whole global batch, so that an epoch's last one goes on with the next epoch's first samples;
there it is of what is left. Every sample comes once before any comes again, and the first lines of a run say how many
are trained on. `warmup_steps` below 1 is a share of all steps; where `warmup_steps` and `warmup_ratio` are both given,
the former is used, as by transformers 4.

Templates, tools and their calls are those of LLaMA-Factory ([what is equal](#against-llama-factory),
[templates](templates.md)). `enable_thinking: false` (templates with thoughts): an empty thought opens the answer and is
not trained.

`packing: true` and `neat_packing: true` in stage `sft`: batch sizes and steps count packs, as many as LLaMA-Factory
makes with one worker; the samples of a pack never see one another, there only with `neat_packing`
([packing](packing.md)).

In `dataset_info.json` further entries are passed over with a note. Where `columns` are given, `query` is read only
if it is among them. A `.txt` file is one document a line for stage `pt`, in the column `text`. `dataset_dir: ONLINE`
and `REMOTE:` are refused: entries with `hf_hub_url` read datasets of the hub.

`dataflex-cli export`, `eval` and `version` are commands here too ([export](export.md)): `eval` gives losses of
datasets, no benchmarks. `chat`, `api` and `webui` say in one line what to use instead. DeepSpeed configs of
LLaMA-Factory's names (`examples/deepspeed/ds_z0_config.json`, `ds_z2_config.json`, `ds_z3_config.json`,
`ds_z2_offload_config.json`, `ds_z3_offload_config.json`) that are not there are dataflex's own, and a note says so.
`logging_steps`, `eval_steps` and `save_steps` below 1 are shares of all steps. A share that `val_size` holds out is
rounded up. `load_best_model_at_end` exports the
[best checkpoint](export.md#the-best-checkpoint); interleaved datasets are a fixed [mixture](mixing.md).

Several machines: the same command on each, with `NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=29500` (29500 where
it is not given) and `NPROC_PER_NODE` (by default all GPUs) in its environment, trains on all of them; a variable that
is missing is named, and none trains alone. Or name the machines in a `--hostfile`. `FORCE_TORCHRUN` changes nothing.
"""


def text() -> str:
    """The whole page."""
    lines = [HEAD, "## Done\n", _names(sorted(SECTION_OF)), "\n## Other names\n"]
    lines += [f"- `{other}`: `{ours}`" for other, ours in table().spellings.items()]
    lines += ["\n## Translated\n", *(f"- `{key}`: {what}" for key, what in table().translated.items())]
    for title, rows in (("Refused", table().refused), ("Ignored with a note", table().ignored)):
        lines.append(f"\n## {title}\n")
        for reason in dict.fromkeys(reason for _, reason in rows):
            lines.append(f"- {_names([key for key, why in rows if why == reason])}: {reason}")
    lines.append("\n## Against LLaMA-Factory\n")
    lines.append("\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(MEASURED))).rstrip())
    return "\n".join(lines) + "\n"


def _names(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
