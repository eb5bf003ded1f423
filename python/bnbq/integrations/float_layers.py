"""Float layers in place of quantised ones: of the class that was there, with its hooks."""

from __future__ import annotations

import torch

from .. import experts, nn


def original_kinds(model, layers: dict) -> dict:
    """Name -> class of the float layer that was there: remembered from loading, else looked up in an empty model."""
    kinds = {name: getattr(layer, "source_cls", None) for name, layer in layers.items()}
    if None in kinds.values():
        with torch.device("meta"):
            empty = type(model)(model.config)
        for name in [name for name, kind in kinds.items() if kind is None]:
            kinds[name] = type(empty.get_submodule(name))
    return kinds


def float_layer(layer, dtype: torch.dtype | None = None, kind: type | None = torch.nn.Linear, weight=None):
    """The float layer that a quantised one stands for, of the class that was there, or the Parameter of experts. Hooks
    move along.

    ``weight`` [out_features, in_features] takes the place of a linear layer's own.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, experts.QuantizedExperts):
        return torch.nn.Parameter(layer.dequantize(dtype))
    if isinstance(layer, nn.QuantizedEmbedding):
        new = layer.to_embedding(dtype)
    else:
        weight = layer.dequantize(dtype) if weight is None else weight
        with torch.device("meta"):
            if issubclass(kind, Conv1D):
                new, weight = Conv1D(layer.out_features, layer.in_features), weight.t().contiguous()
            else:
                new = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.weight = torch.nn.Parameter(weight)
        new.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.detach().to(weight.dtype))
        new.train(layer.training)
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(new, hook)
    return new
