"""What a process knows of the others, and of the libraries that will shard its model."""

from __future__ import annotations

import os

USED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Set by ``accelerate launch``, by Accelerate's plugins and by Transformers' TrainingArguments."""


def parameters_may_be_cast() -> bool:
    """Is this one of several processes, or one under DeepSpeed or FSDP? These cast Parameters, FSDP2 and DeepSpeed in
    mixed precision at least, and which of them it will be is mostly not known when a model is loaded."""
    from transformers.integrations.deepspeed import deepspeed_config

    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")  # torchrun's
    used = any(os.environ.get(name, "").lower() in ("1", "true") for name in USED)
    return several or used or deepspeed_config() is not None
