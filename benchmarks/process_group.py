"""What a benchmark in one process needs of DeepSpeed before it makes an engine."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from dataflex.launcher import free_port


def start_process() -> None:
    """A process group of this process alone, as DeepSpeed wants one, and no chatter."""
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in place.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    from dataflex.utils.logging import logger

    deepspeed_logger.setLevel(logging.WARNING)
    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def end_process() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
