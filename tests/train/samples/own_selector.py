"""A user's selector as the seeds' guide has it: for the package's folder, or named in component_modules."""

import torch.distributed as dist

from dataflex.core.registry import register_selector
from dataflex.utils.logging import logger

from .base_selector import Selector


@register_selector("own_select")
class OwnSelector(Selector):
    def __init__(self, dataset, accelerator, data_collator, cache_dir, stride: int = 1):
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        self.stride = stride
        logger.info("OwnSelector initialized.")

    def select(self, model, step_id: int, num_samples: int, **kwargs) -> list[int]:
        selected = None
        if self.accelerator.is_main_process:
            selected = list(range(0, num_samples * self.stride, self.stride))
            logger.info(f"[OwnSelector] {len(selected)} of {len(self.dataset)} samples at step {step_id}")
        box = [selected]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        self.accelerator.wait_for_everyone()
        return box[0]
