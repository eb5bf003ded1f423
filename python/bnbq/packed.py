"""What every module with packed weights shares: which tensors it has, how they move, save and load.

The packed tensors are plain frozen Parameters. No cast touches them, a move moves them all, ``state_dict`` holds
them under their own names and records their format, and loading checks both (state.py).

DeepSpeed and FSDP2 in mixed precision cast every float Parameter without asking the module. `protect_scales` holds the
float32 ones as int32 of the same bits, which the operators read as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from .config import parse_dtype
from .state import BITS, METADATA_KEY, checked_entries, describe, format_metadata

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def protect_scales(model: nn.Module, protect: bool = True) -> nn.Module:
    """Keep what casts Parameters from rounding the float32 scales of quantised layers; returns ``model``.

    DeepSpeed with bf16 or fp16, and FSDP2 with ``MixedPrecisionPolicy(param_dtype=...)``, cast all float Parameters,
    and a forward with rounded scales is an error. Call this once the weights are loaded, before the model is handed
    to them; models of Transformers need it only where bnbq cannot see that they will be (integrations/parallel.py). The
    scales are then int32 Parameters of the same bits and size. Results are those of before, and so are
    the files that ``save_pretrained`` and `bnbq.save` write. A ``state_dict`` has what the Parameters have; layers take
    either.

    Args:
        model: any module; its quantised layers change in place.
        protect: False turns int32 back into float32.

    Raises ValueError, and changes nothing, where Accelerate keeps a layer's tensors elsewhere between forwards.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    for name, layer in layers.items():
        if layer._parameters["qweight"].is_meta:
            raise ValueError(
                f"protect_scales: {name or layer.describe()} is offloaded; load the model without \"cpu\" or \"disk\" "
                "beside other devices"
            )
    held = {}  # tied layers share their Parameters
    for layer in layers.values():
        for leaf, (_, dtype) in layer.packed_spec().items():
            old = layer._parameters[leaf]
            dtype = BITS if protect and dtype.is_floating_point else dtype
            if old.dtype != dtype:
                if id(old) not in held:
                    held[id(old)] = old, nn.Parameter(old.detach().view(dtype), requires_grad=False)
                layer._parameters[leaf] = held[id(old)][1]
    return model


def state_dict_to_save(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model.state_dict()`` with scales in float32, protected or not."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            for leaf, (_, dtype) in module.packed_spec().items():
                key = f"{name}.{leaf}" if name else leaf
                if key in state:
                    state[key] = state[key].view(dtype)
    return state


def like_held(tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """``tensor``, or its bits if ``held`` is a Parameter that holds scales as bits."""
    return tensor.view(BITS) if held.dtype == BITS and tensor.dtype != BITS else tensor


class PackedModule(nn.Module):
    """Base of the modules whose weight is packed. It reports ``weight_dtype``, the dtype that it dequantises to."""

    _is_hf_initialized = True  # transformers must not initialise packed bytes

    # ------------------------------------------------------------------ what a subclass defines

    def packed_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each packed Parameter, by name."""
        raise NotImplementedError

    def format(self) -> dict:
        """The settings that give the packed bytes their meaning."""
        raise NotImplementedError

    def describe(self) -> str:
        """For messages: "Linear4bit(4096, 1024, nf4)"."""
        raise NotImplementedError

    def _pack(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    # ------------------------------------------------------------------ packing

    def packed(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """What this module stores for ``dense``, a float tensor of the weight's shape: tensors by parameter name, on
        its device. ValueError for a NaN or an Inf; to know, a GPU is waited for, once."""
        dense = dense.detach()
        if dense.is_meta:
            return {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (shape, dtype) in self.packed_spec().items()
            }
        return self._pack(dense if dense.dtype in WEIGHT_DTYPES else dense.float())

    def _check_dense(self, dense) -> None:
        """TypeError or ValueError unless ``dense`` is a float tensor of the shape ``weight_shape``."""
        if not isinstance(dense, torch.Tensor) or not dense.is_floating_point():
            raise TypeError(f"{self.describe()}: the new weight is {describe(dense)}, expected a float tensor")
        if tuple(dense.shape) != self.weight_shape:
            raise ValueError(
                f"{self.describe()}: the new weight has shape {list(dense.shape)}, expected {list(self.weight_shape)}"
            )

    def _register_packed(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The packed tensors by name, detached, each of the dtype that `packed_spec` says."""
        return {name: self._parameters[name].detach().view(dtype) for name, (_, dtype) in self.packed_spec().items()}

    def _fill(self, packed: dict[str, torch.Tensor]) -> None:
        """Into the Parameters that are there, or new ones on another device."""
        for name, tensor in packed.items():
            old = self._parameters[name]
            tensor = like_held(tensor, old)
            if old.device == tensor.device and not old.is_inference():
                old.copy_(tensor)
            else:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    # ------------------------------------------------------------------ nn.Module's machinery

    def _apply(self, fn, recurse=True):
        """A move applies to every tensor, a cast only to what is not packed and to the dtype it reports."""
        packed = {id(self._parameters[name]) for name in self.packed_spec()}

        def moved_not_cast(tensor):
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in packed and result.dtype != tensor.dtype else result

        super()._apply(moved_not_cast, recurse)
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=self._parameters["qweight"].device))
        if probe.is_floating_point():
            self.weight_dtype = probe.dtype if probe.dtype in WEIGHT_DTYPES else torch.float32
        return self

    def _replicate_for_data_parallel(self):
        """A replica holds no Parameters, and would take the packed bytes to every GPU anew for each batch."""
        raise RuntimeError(
            f"{self.describe()}: torch.nn.DataParallel cannot replicate packed weights; use one process per GPU "
            "(DistributedDataParallel or FSDP2, started by torchrun or accelerate launch), or let the process see one "
            "GPU (CUDA_VISIBLE_DEVICES)"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[METADATA_KEY] = format_metadata(self)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        entries = checked_entries(self, state_dict, prefix, metadata, missing_keys, unexpected_keys, error_msgs)
        for name in self.packed_spec().keys() & {key[len(prefix) :] for key in entries}:
            entries[prefix + name] = like_held(entries[prefix + name], self._parameters[name])
        super()._load_from_state_dict(entries, prefix, metadata, False, [], [], error_msgs)

    # ------------------------------------------------------------------ settings

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype to which inputs are rounded before the product; None is the input's own. PEFT reads it."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, value) -> None:
        self._compute_dtype = parse_dtype(value, f"{type(self).__name__}.compute_dtype")
