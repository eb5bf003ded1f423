"""Between the layers of this facade and those of `bnbq.nn`: the same packed tensors under the other names."""

from __future__ import annotations

import torch

from .. import nn as native
from ..checkpoint_bnb import BNB_QUANT_TYPES
from ..ops import Packed4
from .nn.modules import Linear4bit, Linear8bitLt
from .nn.parameters import Int8Params, Params4bit
from .quant_state import core_weight, state_from_core


def to_bnbq(module: torch.nn.Module) -> torch.nn.Module:
    """Replace the facade's linear layers by `bnbq.nn`'s, which share their memory and give the same bits.

    Args:
        module: a layer, or a model, changed in place. Embeddings are left as they are.

    Returns the new layer, or the model. Raises ValueError, and nothing has changed then, for a layer that is not
    quantised, naming it.
    """
    return converted(module, {Linear4bit: native_4bit, Linear8bitLt: native_8bit})


def from_bnbq(module: torch.nn.Module) -> torch.nn.Module:
    """The inverse of `to_bnbq`.

    Raises ValueError for a format that bitsandbytes lacks (int4, int8 in blocks). Settings that it lacks are dropped:
    ``activations="int8"``, and the ``compute_dtype`` of an 8-bit layer.
    """
    return converted(module, {native.Linear4bit: facade_4bit, native.Linear8bitLt: facade_8bit})


def converted(module: torch.nn.Module, converters: dict) -> torch.nn.Module:
    new = {}
    for name, layer in module.named_modules():
        for kind, convert in converters.items():
            if isinstance(layer, kind):
                try:
                    new[layer] = convert(layer).train(layer.training)
                except ValueError as error:
                    raise ValueError(f"{name or type(layer).__name__}: {error}") from None
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)


def native_4bit(layer: Linear4bit) -> native.Linear4bit:
    try:
        packed, state = layer.packed_weight()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    weight = core_weight(packed, state)
    return native_layer(
        native.Linear4bit,
        layer,
        {name: tensor for name, tensor in weight._asdict().items() if tensor is not None},
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        double_quant=weight.absmax2 is not None,
        compute_dtype=layer.compute_dtype,
        weight_dtype=state.dtype,
    )


def native_8bit(layer: Linear8bitLt) -> native.Linear8bitLt:
    scales = layer.row_scales()
    if layer.weight.dtype != torch.int8 or scales is None:
        why = "has_fp16_weights=True trains a float weight" if layer.state.has_fp16_weights else "move it to a device"
        raise ValueError(f"the weight is not quantised ({why})")
    tensors = {"qweight": layer.weight.data, "absmax": scales}
    return native_layer(native.Linear8bitLt, layer, tensors, threshold=layer.state.threshold)


def native_layer(kind, layer, tensors: dict, **settings):
    new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", **settings)
    for name, tensor in tensors.items():
        new.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    new.register_parameter("bias", layer.bias)
    return new


def facade_4bit(layer: native.Linear4bit) -> Linear4bit:
    if layer.quant_type not in BNB_QUANT_TYPES:
        raise ValueError(f"bitsandbytes has no {layer.quant_type}")
    tensors = {name: parameter.data for name, parameter in layer.named_parameters() if name != "bias"}
    shape = layer.out_features, layer.in_features
    state = state_from_core(Packed4(**tensors), layer.quant_type, layer.blocksize, shape, layer.weight_dtype)
    new = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.compute_dtype,
        compress_statistics=layer.double_quant,
        quant_type=layer.quant_type,
        device="meta",
    )
    new.weight = Params4bit(module=new)
    new.weight.set_packed(layer.qweight.data.reshape(-1, 1), state)
    new.register_parameter("bias", layer.bias)
    return new


def facade_8bit(layer: native.Linear8bitLt) -> Linear8bitLt:
    if layer.blocksize:
        raise ValueError(f"bitsandbytes has no int8 in blocks of {layer.blocksize}, only one scale per row")
    new = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=layer.threshold,
        device="meta",
    )
    new.weight = Int8Params(layer.qweight.data, requires_grad=False, SCB=layer.absmax.data)
    new.register_parameter("bias", layer.bias)
    return new
