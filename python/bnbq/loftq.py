"""LoRA adapters that start by making up for what quantising the base lost (LoftQ, Li et al. 2023, arXiv:2310.08659).

Adapters of rank r start as the best rank-r approximation of W - Q, the float weight less the quantised one. This is
LoftQ's first step, the one that leaves the base's bytes alone, so that the adapters fit every copy of the quantised
model; ``peft.replace_lora_weights_loftq`` does it for bitsandbytes' layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import nn, shards
from .integrations.names import Names
from .state import describe

OVERSAMPLE, POWER_ITERATIONS = 8, 4
"""Of the randomised SVD (Halko et al. 2011): rounding errors have a flat spectrum, which wants power iterations."""


class Start(NamedTuple):
    """Of one layer: |W - Q| / |W| without the adapter, and with it."""

    without: float
    error: float


def init_loftq(
    model,
    source=None,
    adapter_name: str = "default",
    callback: Callable[[torch.nn.Module, str], bool] | None = None,
) -> dict[str, Start]:
    """Set the LoRA weights on quantised layers to the best approximation of what quantising them lost.

    Args:
        model: a PeftModel with LoRA on a quantised base.
        source: where the float weights are: a directory with safetensors, read one tensor at a time, or the float
            model in memory. None is the directory from which the base was loaded.
        callback: called with the model and a layer's name after each layer; False takes that layer's start back.

    Returns what was gained by layer name. Nothing else of the model changes; the result does not depend on the global
    random state. Raises TypeError for another kind of model, ValueError (UserError for files) that names the layer or
    file for LoRA variants, offloaded layers, and weights that are missing, misshapen or not finite.
    """
    base, tuners = lora_layers(model, adapter_name)
    read = weights(base, tuners, source)
    gained = {}
    for name, tuner in tuners.items():
        a, b = tuner.lora_A[adapter_name].weight, tuner.lora_B[adapter_name].weight
        before = a.detach().clone(), b.detach().clone()
        gained[name] = start(name, tuner, read(name), a, b, tuner.scaling[adapter_name])
        if callback is not None and not callback(model, name):
            a.data.copy_(before[0])
            b.data.copy_(before[1])
            gained[name] = Start(gained[name].without, gained[name].without)
    return gained


def lora_layers(model, adapter_name: str):
    """The model inside a PeftModel, and its LoRA layers on quantised ones by name."""
    from peft import PeftModel
    from peft.tuners.lora import Linear

    if not isinstance(model, PeftModel):
        raise TypeError(f"init_loftq: got {type(model).__name__}, expected a PeftModel with LoRA")
    base = model.get_base_model()
    tuners = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, Linear)
        and isinstance(module.base_layer, nn.QuantizedLinear)
        and adapter_name in module.lora_A
    }
    if not tuners:
        raise ValueError(f"init_loftq: no quantised layer has a LoRA adapter {adapter_name!r}")
    for name, tuner in tuners.items():
        if adapter_name in tuner.lora_variant:
            variant = type(tuner.lora_variant[adapter_name]).__name__
            raise ValueError(f"init_loftq: {name}: its adapter is a {variant}, expected plain LoRA")
        if tuner.merged or tuner.base_layer.qweight.is_meta:
            raise ValueError(f"init_loftq: {name} is {'merged' if tuner.merged else 'offloaded, or has no data'}")
    return base, tuners


@torch.no_grad()
def start(name: str, tuner, weight: torch.Tensor, a, b, scaling: float) -> Start:
    """Fill a [r, k] and b [n, r] for one layer, whose float weight is ``weight``."""
    layer = tuner.base_layer
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise ValueError(
            f"init_loftq: {name}: the float weight is {describe(weight)}, "
            f"expected shape {[layer.out_features, layer.in_features]}"
        )
    weight = weight.to(layer.qweight.device, torch.float32)
    if not torch.isfinite(weight).all():
        raise ValueError(f"init_loftq: {name}: the float weight is not finite")
    lost, rank = weight - layer.dequantize(torch.float32), a.shape[0]
    size = weight.norm().clamp_min(1e-30)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(lost, q=min(rank + OVERSAMPLE, *lost.shape), niter=POWER_ITERATIONS)
    rank, root = min(rank, len(s)), s[:rank].sqrt()
    a.zero_()[:rank] = root[:, None] * v[:, :rank].T
    b.zero_()[:, :rank] = u[:, :rank] * root / scaling
    left = lost - scaling * (b.float() @ a.float())
    return Start((lost.norm() / size).item(), (left.norm() / size).item())


def weights(base: torch.nn.Module, tuners: dict, source) -> Callable[[str], torch.Tensor]:
    """A function: layer name -> its float weight [n, k]."""
    if isinstance(source, torch.nn.Module):
        return lambda name: nn.dense_weight(source.get_submodule(name))
    if source is None:
        source = getattr(getattr(base, "config", None), "_name_or_path", None) or ""
        if not Path(source).is_dir():
            raise ValueError(
                f"init_loftq: the base was loaded from {source!r}, which is no directory here; give the directory of "
                "the float model, or the model, as source"
            )
    from .integrations.float_layers import original_kinds

    kinds = original_kinds(base, {name: tuner.base_layer for name, tuner in tuners.items()})
    files, names = shards.Source(source), Names(base)
    known = {f"{name}.weight": True for name in tuners}
    found = {}
    for key, file in files.locate().items():
        name, converted = names.find(key, known)
        if name in known and not converted:
            found[name.removesuffix(".weight")] = (file, key)
    missing = sorted(tuners.keys() - found.keys())
    if missing:
        raise ValueError(
            f"init_loftq: {source} has no float weight of its own for {missing[0]} ({len(missing)} layers in all); "
            "give the float model in memory as source"
        )

    def read(name: str) -> torch.Tensor:
        tensor = files.tensor(*found[name])
        return tensor if issubclass(kinds[name], torch.nn.Linear) else tensor.t()

    return read
