"""What a process knows of the others, and of the libraries that will shard its model."""

from __future__ import annotations

import os

USED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Set by ``accelerate launch``, by Accelerate's plugins and by Transformers' TrainingArguments."""
SPLITS = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")
"""What splits a model in Transformers' DistributedConfig; where experts are split (ep_size) one of these is set too."""


def parameters_may_be_cast() -> bool:
    """Is this one of several processes, or one under DeepSpeed or FSDP? These cast Parameters, FSDP2 and DeepSpeed in
    mixed precision at least, and which of them it will be is mostly not known when a model is loaded."""
    from transformers.integrations.deepspeed import deepspeed_config

    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")  # torchrun's
    used = any(os.environ.get(name, "").lower() in ("1", "true") for name in USED)
    return several or used or deepspeed_config() is not None


def refuse_split(model) -> None:
    """ValueError where Transformers would split the model before its weights are quantised, or verified."""
    distributed = getattr(model.config, "distributed_config", None)
    for key in SPLITS:
        size = getattr(distributed, key, None) or 1
        if size > 1:
            raise ValueError(
                f"bnbq: a quantised model cannot be split while it is loaded ({key} is {size}); load it with a "
                "device_map, or whole in each process for DistributedDataParallel or FSDP2's fully_shard"
            )
