"""PEFT: preparing a quantised model for adapters, and counting its parameters as the float model's.

PEFT itself needs nothing from here: a quantised layer is an nn.Linear whose ``weight`` dequantises when it is
read and requantises when it is written, so its tuners inject, train, merge and unmerge as on a float model.
"""

from __future__ import annotations

import inspect

import torch

from ..nn import QuantizedLinear


def prepare_model_for_kbit_training(model, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict | None = None,
                                    auto_clear_cache: bool = True):
    """Freeze a quantised Transformers model and turn on gradient checkpointing, before adapters are added.

    Takes PEFT's arguments and does what PEFT's function of this name does for bitsandbytes' models, but casts
    nothing: norms, embeddings and the head keep their dtype, which costs no memory (sums are fp32 in any case).
    ``auto_clear_cache`` has no effect: there is nothing to clear. Returns the model.

    PEFT's own function works as well. It casts what is fp16 or bf16 to fp32, and leaves checkpointing to you.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if not use_gradient_checkpointing:
        return model
    arguments = dict(gradient_checkpointing_kwargs or {})
    if arguments.get("use_reentrant", True):
        # A reentrant checkpoint passes no gradient on to adapters unless its input wants one.
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable()
    return model


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, a quantised weight counted as the n * k numbers that it stands for."""
    packed = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for leaf in module.packed_spec():
                packed[id(module._parameters[leaf])] = module.in_features * module.out_features if leaf == "qweight" else 0
    trainable = total = 0
    for parameter in model.parameters():
        count = packed.get(id(parameter), parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: torch.nn.Module) -> None:
    """Print what PEFT's method of this name prints, for the logical counts.

    PEFT counts the packed tensors by their own sizes, which makes the base model look half (4 bit) as large.
    """
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}")
