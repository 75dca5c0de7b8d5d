"""One YAML run inside an already launched process: start the process group, then do what the command says."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from datetime import timedelta

import torch

from dataflex.config import Config
from dataflex.driver.check import check
from dataflex.driver.doremi import three_runs
from dataflex.driver.embedding import embed
from dataflex.driver.evaluating import evaluate
from dataflex.driver.scoring import score
from dataflex.driver.training import train
from dataflex.engine.ds_config import check_possible
from dataflex.report.plot import check_plotting
from dataflex.utils import dist
from dataflex.utils.room import full_disk_said
from dataflex.utils.watchdog import patience, watched

COMMANDS = {
    "check": check,
    "doremi": three_runs,
    "embed": embed,
    "eval": evaluate,
    "score": score,
    "train": train,
}


def run(cfg: Config, command: str = "train") -> int:
    """Do what ``command`` says (a key of `COMMANDS`) with ``cfg``; every process of the launch calls it.

    Returns the exit code: 0, 75 where the run was asked to end before its last step, or that of `watched`.
    """
    _be_quiet()
    check_possible(cfg)
    if cfg.output.plot_loss:
        check_plotting()
    _start_process_group(cfg)
    return watched(lambda: _do(command, cfg), cfg.train.ddp_timeout)


def _do(command: str, cfg: Config) -> None:
    from datasets.config import HF_DATASETS_CACHE

    places = {
        "output_dir": cfg.output.output_dir,
        "features_dir": cfg.score.features_dir or "",
        "tokenized_path": cfg.data.tokenized_path or "",
        "HF_DATASETS_CACHE": str(HF_DATASETS_CACHE),
        "TMPDIR": tempfile.gettempdir(),
    }
    with full_disk_said(places):
        COMMANDS[command](cfg)


def _be_quiet() -> None:
    """Nothing of DeepSpeed's and transformers' own chatter; their warnings once, from rank 0."""
    import transformers
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(_is_news)
    transformers.utils.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather_into|reduce_scatter)_tensor.*")


def _is_news(record: logging.LogRecord) -> bool:
    """False for warnings about what is meant so: sgd under ZeRO, a schedule asked for its first rate."""
    text = record.getMessage()
    return "untested optimizer" not in text and "scheduler before it has started" not in text


def _start_process_group(cfg: Config) -> None:
    """Never compile DeepSpeed's shared-memory kernel for CPUs; let our watch speak before a library's timeout does."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    wait_s = patience(cfg.train.ddp_timeout)
    dist.let_all_groups_wait(wait_s)
    deepspeed.init_distributed(timeout=timedelta(seconds=wait_s), verbose=False)
