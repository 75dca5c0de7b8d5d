"""What every rank would do for itself before its first step; the server of `tests.distributed` does it once.

No backward pass: what autograd sets up for one does not outlive a fork. No tokenizer: its threads do not either.
"""

from __future__ import annotations

import gc
import importlib

import deepspeed.ops
import torch

gc.disable()  # all this stays
for name in (
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
    "deepspeed.runtime.zero.muon.original_muon",  # torch.compile's modules: seconds, at the first engine
    *("datasets", "peft", "pybind11.commands", "pytest", "torch.utils.serialization.config"),
    *("dataflex.driver.training", "dataflex.driver.scoring", "dataflex.train.trainer.initialize", "tests.families"),
):
    importlib.import_module(name)

from dataflex.forward.head import find_head  # noqa: E402
from dataflex.ops.native._ext import load  # noqa: E402
from dataflex.scoring.gradients.coverage import find_targets  # noqa: E402
from tests import tiny_engine as tiny  # noqa: E402

# Asks a compiler what there is. Shared memory would be built for, by each process, where gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
load("cpu")
with torch.no_grad():
    for kind in ("full", "lora", "moe"):
        net = tiny.model(kind)
        find_head(net)
        find_targets(net)  # reads the sources of their layers
        net(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]))
gc.freeze()
gc.enable()
