"""Parameters of any module in 4 bits: stored packed, dequantised when they are read. For the experts of a mixture, say.

A read gives a new float tensor; within one call of the module's ``forward`` it is the same one. Such a parameter is not
trainable and cannot be assigned. State dicts hold it by the keys of a `Params4bit`, and load from them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import functional
from ..quant_state import QuantState, core_weight


class Bnb4bitParametrization(nn.Module):
    """Packed bytes u8 [bytes, 1] -> ``quant_state.shape`` in ``quant_state.dtype``."""

    def __init__(self, quant_state: QuantState):
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return functional.dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn, recurse=True):
        """The scales follow a move; a cast does not reach them."""
        self.quant_state.to(fn(self.quant_state.absmax[:0]).device)
        return super()._apply(fn, recurse)


def replace_parameter_4bit(module: nn.Module, param_name: str, compress_statistics: bool = False,
                           quant_type: str = "nf4", blocksize: int | None = None) -> None:
    """Quantise a float Parameter of any shape, in place. The arguments are those of `functional.quantize_4bit`.

    Raises AttributeError if there is none of that name, TypeError if it is no Parameter.
    """
    dense = parameter_of(module, param_name).data
    packed, state = functional.quantize_4bit(
        dense, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    decode_when_read(module, param_name, state)


def replace_parameter_4bit_prequantized(module: nn.Module, param_name: str, qs_dict: dict, device) -> None:
    """The same for a Parameter that holds packed bytes already; qs_dict is what `QuantState.from_dict` takes."""
    parameter_of(module, param_name)
    decode_when_read(module, param_name, QuantState.from_dict(qs_dict, device=device))


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} does not have parameter {name!r}")
    if not isinstance(getattr(module, name), nn.Parameter):
        raise TypeError(f"{type(module).__name__}: {name!r} is not an instance of nn.Parameter")
    return getattr(module, name)


def decode_when_read(module: nn.Module, name: str, state: QuantState) -> None:
    # unsafe: it changes shape and dtype.
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.register_state_dict_post_hook(partial(save, name=name))
    module.register_load_state_dict_pre_hook(partial(load, name=name))
    module.register_forward_pre_hook(start_caching)
    module.register_forward_hook(stop_caching, always_call=True)


# ------------------------------------------------------------------ hooks


def save(module, state_dict, prefix, local_metadata, *, name: str) -> None:
    """bitsandbytes' keys in place of the parametrisation's."""
    packed = state_dict.pop(f"{prefix}parametrizations.{name}.original", None)
    if packed is not None:
        state_dict[prefix + name] = packed
        for key, value in decoder(module, name).quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{name}.{key}"] = value


def load(module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs, *, name: str):
    statistics = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{prefix}{name}.")}
    packed = state_dict.pop(prefix + name, None)
    if packed is None:
        return
    original = f"parametrizations.{name}.original"
    here = module.get_parameter(original)
    try:
        state = QuantState.from_dict(statistics, here.device)
        core_weight(packed, state)
    except ValueError as error:
        error_msgs.append(f"{prefix}{name}: {error}")
        return
    state_dict[prefix + original] = packed
    if packed.shape == here.shape:  # otherwise torch refuses it
        decoder(module, name).quant_state = state


def decoder(module, name: str) -> Bnb4bitParametrization:
    return next(part for part in module.parametrizations[name] if isinstance(part, Bnb4bitParametrization))


open_caches: list = []  # of the forwards that run; torch counts them, so that any of them closes as well as another


def start_caching(module, inputs) -> None:
    cache = parametrize.cached()
    cache.__enter__()
    open_caches.append(cache)


def stop_caching(module, inputs, output) -> None:
    """Also called when the forward raised (gradient checkpointing stops a recomputation so)."""
    if open_caches:
        open_caches.pop().__exit__(None, None, None)
