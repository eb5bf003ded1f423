"""PEFT: preparing a quantised model for adapters, and putting them on layers that Accelerate streams.

Otherwise PEFT needs nothing from here: a quantised layer is an nn.Linear whose ``weight`` dequantises when it is
read and requantises when it is written, so its tuners inject, train, merge and unmerge as on a float model.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from .offload import is_offloaded


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


def get_peft_model(model, peft_config, *args, **kwargs):
    """``peft.get_peft_model``, also for a model with layers that Accelerate keeps on the CPU or on disk for their turn.

    PEFT puts an adapter where its layer's tensors are. An offloaded layer's are on the meta device between forwards,
    and an adapter there has lost its values; here it goes where the layer computes, and stays there. A model without
    offloaded layers is passed on as it is. Takes and returns what PEFT's function does.

    Raises ValueError for what needs the values of an offloaded weight: PiSSA, OLoRA, DoRA and their like, and
    ``modules_to_save`` that are offloaded.
    """
    import peft

    offloaded = offloaded_modules(model)
    if offloaded:
        check_start(model, peft_config, offloaded)
    with resident(offloaded):
        return peft.get_peft_model(model, peft_config, *args, **kwargs)


def check_start(model: torch.nn.Module, peft_config, offloaded: dict) -> None:
    """ValueError for an adapter that cannot start without the weights of the offloaded modules."""
    start = getattr(peft_config, "init_lora_weights", True)
    if getattr(peft_config, "use_dora", False) or (isinstance(start, str) and start != "gaussian"):
        setting = "use_dora" if getattr(peft_config, "use_dora", False) else f"init_lora_weights={start!r}"
        raise ValueError(f"get_peft_model: {setting} reads weights, and some are offloaded; load the model whole")
    copied = tuple(getattr(peft_config, "modules_to_save", None) or ())
    for name, module in model.named_modules():
        if module in offloaded and copied and f".{name}".endswith(tuple(f".{end}" for end in copied)):
            raise ValueError(f"get_peft_model: {name} is in modules_to_save and offloaded; give it a device of its own")


def offloaded_modules(model: torch.nn.Module) -> dict:
    """Module -> where it computes, for those whose parameters a hook of Accelerate brings for each forward."""
    found = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
        runs_on = next((device for device in devices if device is not None), None)
        if runs_on is not None and is_offloaded(module):
            found[module] = torch.device(runs_on)
    return found


@contextmanager
def resident(modules: dict):
    """Let offloaded modules look as if they were where they compute: their parameters are empty ones there."""
    held = {module: dict(module._parameters) for module in modules}
    for module, device in modules.items():
        for name, parameter in held[module].items():
            if parameter is not None:
                empty = torch.empty(0, dtype=parameter.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for module, parameters in held.items():
            module._parameters.update(parameters)
            for parameter in parameters.values():
                if parameter is not None:  # as PEFT leaves what is no adapter
                    parameter.requires_grad_(False)
