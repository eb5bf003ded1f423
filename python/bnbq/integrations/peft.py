"""PEFT: preparing a quantised model for adapters.

PEFT itself needs nothing from here: a quantised layer is an nn.Linear whose ``weight`` dequantises when it is
read and requantises when it is written, so its tuners inject, train, merge and unmerge as on a float model.
"""

from __future__ import annotations


def prepare_model_for_kbit_training(
    model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
):
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
    arguments = dict(gradient_checkpointing_kwargs) if gradient_checkpointing_kwargs else None
    if (arguments or {}).get("use_reentrant", True):
        # A reentrant checkpoint passes no gradient on to adapters unless its input wants one.
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(True)
            )
    if hasattr(model, "activation_checkpointing_enable"):  # None is not reentrant there
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return model
