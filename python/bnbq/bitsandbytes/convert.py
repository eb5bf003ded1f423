"""Between the layers of this facade and those of `bnbq.nn`: the same packed tensors under the other names."""

from __future__ import annotations

import torch

from .. import nn as native
from ..checkpoint import PACKED_NAMES
from ..checkpoint_bnb import BNB_QUANT_TYPES
from ..matrix import PackedMatrix
from ..ops import Packed4
from ..packed import WEIGHT_DTYPES
from ..replace import keep_hooks
from ..state import LIKE
from .nn.modules import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from .nn.packed import Layer4bit, Layer8bit
from .nn.parameters import Int8Params, Params4bit
from .quant_state import core_weight, state_from_core

TENSORS = {"weight", "bias", LIKE, *PACKED_NAMES}


def to_bnbq(module: torch.nn.Module) -> torch.nn.Module:
    """Replace the facade's layers and embeddings by `bnbq.nn`'s, which share their memory and give the same bits.

    Args:
        module: a layer, or a model, changed in place. What shares a weight shares it afterwards.

    Returns the new layer, or the model. Forward and backward hooks are kept, ``quant_storage`` is not. ValueError,
    naming the layer, and nothing has changed then: one that is not quantised, one with a forward or tensors of its own
    (a subclass, one that Accelerate has dispatched), or an embedding that decodes rows in one dtype
    (``quant_state.dtype``) and returns them in another (``dtype``).
    """
    return converted(
        module,
        {
            Linear4bit: native_linear4bit,
            Linear8bitLt: native_linear8bit,
            Embedding4bit: native_embedding4bit,
            Embedding8bit: native_embedding8bit,
        },
        weight="weight",
        tie=lambda new, first: new.tie_(first),
    )


def from_bnbq(module: torch.nn.Module) -> torch.nn.Module:
    """The inverse of `to_bnbq`.

    Raises ValueError for what bitsandbytes lacks: int4, int8 in blocks, a side branch, an embedding's own forward, a
    shared weight that is decoded in two dtypes. Settings that it lacks are dropped: ``activations="int8"``, and the
    ``compute_dtype`` of an 8-bit layer.
    """
    return converted(
        module,
        {
            native.Linear4bit: facade_linear4bit,
            native.Linear8bitLt: facade_linear8bit,
            native.Embedding4bit: facade_embedding4bit,
            native.Embedding8bit: facade_embedding8bit,
        },
        weight="qweight",
        tie=share_weight,
    )


def converted(module: torch.nn.Module, converters: dict, weight: str, tie) -> torch.nn.Module:
    """``weight`` names the Parameter that layers share if they are tied."""
    new, firsts = {}, {}
    for name, layer in module.named_modules():
        for kind, convert in converters.items():
            if isinstance(layer, kind):
                try:
                    check_plain(layer, kind)
                    new[layer] = convert(layer).train(layer.training)
                    first = firsts.setdefault(getattr(layer, weight), new[layer])
                    if first is not new[layer]:
                        tie(new[layer], first)
                    keep_hooks(layer, new[layer])
                except ValueError as error:
                    raise ValueError(f"{name or type(layer).__name__}: {error}") from None
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)


def check_plain(layer: torch.nn.Module, kind: type) -> None:
    """ValueError for what the counterpart of a ``kind`` would lose: adapters, side branches, hooks of Accelerate."""
    if "forward" in vars(layer) or type(layer).forward is not kind.forward:
        raise ValueError(f"{type(layer).__name__} with a forward of its own (a hook of Accelerate's, or a subclass's)")
    more = [name for name in (*layer._parameters, *layer._buffers, *layer._modules) if name not in TENSORS]
    if more:
        raise ValueError(f"{type(layer).__name__} with {', '.join(more)}, which its counterpart does not have")


# ------------------------------------------------------------------ to bnbq.nn


def native_linear4bit(layer: Linear4bit) -> native.Linear4bit:
    tensors, settings = native_4bit(layer)
    return native_linear(native.Linear4bit, layer, tensors, compute_dtype=layer.compute_dtype, **settings)


def native_linear8bit(layer: Linear8bitLt) -> native.Linear8bitLt:
    return native_linear(native.Linear8bitLt, layer, native_8bit(layer), threshold=layer.state.threshold)


def native_embedding4bit(layer: Embedding4bit) -> native.Embedding4bit:
    tensors, settings = native_4bit(layer)
    if layer.dtype != settings["weight_dtype"]:
        raise ValueError(
            f"its rows are decoded in {settings['weight_dtype']} and returned in {layer.dtype}, bnbq's are returned as "
            "they are decoded; set its dtype to the former first"
        )
    return native_embedding(native.Embedding4bit, layer, tensors, **settings)


def native_embedding8bit(layer: Embedding8bit) -> native.Embedding8bit:
    if layer.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"its rows are returned in {layer.dtype}; bnbq's are float32, bfloat16 or float16")
    return native_embedding(native.Embedding8bit, layer, native_8bit(layer), weight_dtype=layer.dtype)


def native_4bit(layer: Layer4bit) -> tuple[dict, dict]:
    """The packed tensors by bnbq's names, and the settings that describe them."""
    try:
        packed, state = layer.packed_weight()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    weight = core_weight(packed, state)
    tensors = {name: tensor for name, tensor in weight._asdict().items() if tensor is not None}
    return tensors, dict(
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        double_quant=weight.absmax2 is not None,
        weight_dtype=state.dtype,
    )


def native_8bit(layer: Layer8bit) -> dict:
    scales = layer.row_scales()
    if layer.weight.dtype != torch.int8 or scales is None:
        trains = getattr(layer.weight, "has_fp16_weights", False)
        why = "has_fp16_weights=True trains a float weight" if trains else "move it to a device"
        raise ValueError(f"the weight is not quantised ({why})")
    return {"qweight": layer.weight.data, "absmax": scales}


def native_linear(kind, layer, tensors: dict, **settings):
    new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", **settings)
    new._register_packed(tensors)
    new.register_parameter("bias", layer.bias)
    return new


def native_embedding(kind, layer, tensors: dict, **settings):
    new = kind(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta", **settings)
    like = tensors["qweight"].new_zeros(1, dtype=settings["weight_dtype"])
    new._register_packed({LIKE: like, **tensors})
    return new


# ------------------------------------------------------------------ from bnbq.nn


def facade_linear4bit(layer: native.Linear4bit) -> Linear4bit:
    new = Linear4bit(*facade_sizes(layer), compute_dtype=layer.compute_dtype, device="meta")
    new.register_parameter("bias", layer.bias)
    return facade_4bit(new, layer)


def facade_linear8bit(layer: native.Linear8bitLt) -> Linear8bitLt:
    new = Linear8bitLt(*facade_sizes(layer), has_fp16_weights=False, threshold=layer.threshold, device="meta")
    new.register_parameter("bias", layer.bias)
    return facade_8bit(new, layer)


def facade_embedding4bit(layer: native.Embedding4bit) -> Embedding4bit:
    return facade_4bit(facade_embedding(Embedding4bit, layer), layer)


def facade_embedding8bit(layer: native.Embedding8bit) -> Embedding8bit:
    return facade_8bit(facade_embedding(Embedding8bit, layer), layer)


def facade_sizes(layer) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def facade_embedding(kind, layer):
    new = kind(*layer.weight_shape, dtype=layer.weight_dtype, device="meta")
    new.padding_idx = layer.padding_idx
    return new


def facade_4bit(new: Layer4bit, layer: PackedMatrix) -> Layer4bit:
    if layer.quant_type not in BNB_QUANT_TYPES:
        raise ValueError(f"bitsandbytes has no {layer.quant_type}")
    weight = Packed4(**layer.packed_tensors())
    state = state_from_core(weight, layer.quant_type, layer.blocksize, layer.weight_shape, layer.weight_dtype)
    new.weight = Params4bit(module=new)
    new.weight.set_packed(weight.qweight.reshape(-1, 1), state)
    return new


def facade_8bit(new: Layer8bit, layer: PackedMatrix) -> Layer8bit:
    if layer.blocksize:
        raise ValueError(f"bitsandbytes has no int8 in blocks of {layer.blocksize}, only one scale per row")
    tensors = layer.packed_tensors()
    new.weight = Int8Params(tensors["qweight"], requires_grad=False, SCB=tensors["absmax"])
    return new


def share_weight(new, first) -> None:
    """The weight decodes to one dtype, that of its quant_state."""
    if isinstance(new, Layer4bit):
        mine, theirs = new.quant_state, first.quant_state
        if mine.dtype != theirs.dtype:
            raise ValueError(f"it decodes its weight in {mine.dtype}, a layer that shares it in {theirs.dtype}")
        new.quant_state = theirs
    new.weight = first.weight
