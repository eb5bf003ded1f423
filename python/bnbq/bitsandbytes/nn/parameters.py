"""Params4bit and Int8Params: weights that quantise themselves when they are moved to a device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ... import ops
from .. import functional
from ..quant_state import QuantState


def rebuild(cls, data: Tensor, requires_grad: bool):
    return cls(data, requires_grad=requires_grad)


class SelfQuantizing(torch.nn.Parameter):
    """What the two share: a move quantises, and keeps the class and what it stores beside its data, as copies do."""

    quantizes_itself: bool
    is_packed: bool

    def pack(self, dense: Tensor) -> tuple:
        """What ``set_packed`` takes, for a float weight."""
        raise NotImplementedError

    def set_packed(self, *packed) -> None:
        """Become the packed weight, in place."""
        raise NotImplementedError

    def move_scales(self) -> None:
        """Bring what ``set_packed`` stored beside the bytes to where they are. On meta that stays behind: Accelerate's
        hooks send the bytes alone there, and bring them alone back."""
        raise NotImplementedError

    def to(self, *args, **kwargs):
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.is_packed and self.quantizes_itself and device is not None and device.type != "meta":
            self.set_packed(*self.pack(self.data.to(device, non_blocking=non_blocking)))
            return self
        moved = self.like(super().to(device, None if self.is_packed else dtype, non_blocking))
        if self.is_packed:
            moved.move_scales()
        return moved

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device=None, non_blocking: bool = False):
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device=None, non_blocking: bool = False):
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def like(self, data: Tensor):
        """Other data with the same settings."""
        new = torch.Tensor._make_subclass(type(self), data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        return new

    def __copy__(self):
        return self.like(self.data)

    def __deepcopy__(self, memo):
        new = memo[id(self)] = self.like(copy.deepcopy(self.data, memo))
        for name, value in self.__dict__.items():
            # The layer's copy if the layer is being copied; the copy of a weight alone still belongs to the layer.
            new.__dict__[name] = memo.get(id(value), value) if name == "module" else copy.deepcopy(value, memo)
        return new

    def __reduce_ex__(self, protocol):
        return rebuild, (type(self), self.data, self.requires_grad), self.__dict__.copy()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def stored(name: str, nested: bool = False) -> property:
    """An attribute of the quant_state: FSDP looks up "weight.absmax" and the like as attributes of the weight."""

    def get(self):
        state = self.__dict__.get("quant_state")
        if nested and state is not None:
            state = state.state2
        if state is None:
            raise AttributeError(f"'{type(self).__name__}' has no {name}: its weight is not quantised that way")
        return getattr(state, name)

    return property(get)


class Params4bit(SelfQuantizing):
    """A weight that is packed in 4 bits when it is first moved to a device ("cpu" is one; meta is not).

    Args:
        data: float of any shape; with bnb_quantized the packed bytes.
        blocksize: 64 unless given. compress_statistics: quantise the scales too.
        quant_type: "fp4" or "nf4". quant_storage: dtype under which the bytes are stored.
        module: a layer whose ``quant_state`` is kept the same as this one's.
        kwargs: ignored.

    Once packed no cast touches the bytes.
    """

    def __new__(cls, data=None, requires_grad=False, quant_state: QuantState | None = None, blocksize=None,
                compress_statistics=True, quant_type="fp4", quant_storage=torch.uint8, module=None,
                bnb_quantized=False, **kwargs):
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(cls, data: Tensor, quantized_stats: dict, requires_grad=False, device=None, module=None,
                          **kwargs) -> Params4bit:
        """A weight from a state dict: the packed bytes, and the rest by the names of `QuantState.as_dict`.

        device: None leaves it where data is. Raises ValueError for entries that do not make a QuantState.
        """
        data = data if device is None else data.to(device)
        state = QuantState.from_dict(quantized_stats, data.device)
        new = cls(data, requires_grad, module=module)
        new.set_packed(data, state)
        return new

    absmax, code, quant_map = stored("absmax"), stored("code"), stored("code")
    offset, nested_offset, state2 = stored("offset"), stored("offset"), stored("state2")
    nested_absmax, nested_blocksize = stored("absmax", nested=True), stored("blocksize", nested=True)
    nested_quant_map, nested_dtype = stored("code", nested=True), stored("dtype", nested=True)

    quantizes_itself = True

    @property
    def is_packed(self) -> bool:
        return self.bnb_quantized

    def pack(self, dense: Tensor) -> tuple[Tensor, QuantState]:
        return functional.quantize_4bit(
            dense,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )

    def set_packed(self, packed: Tensor, state: QuantState) -> None:
        self.data, self.quant_state, self.bnb_quantized = packed, state, True
        self.blocksize, self.quant_type, self.compress_statistics = state.blocksize, state.quant_type, state.nested
        self.quant_storage = packed.dtype
        if self.module is not None:
            self.module.quant_state = state

    def move_scales(self) -> None:
        if self.quant_state is not None and not self.is_meta:  # others may hold it, too
            self.quant_state.to(self.device)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.chunk, torch.split):  # FSDP shards with them
            return tuple(args[0].like(part) for part in result)
        return result


class Int8Params(SelfQuantizing):
    """A weight that becomes int8 with a scale per row when it is first moved to a device, unless has_fp16_weights.

    Args:
        data: float [n, k], or int8 with its SCB.
        SCB: absmax f32 [n].
        CB: the int8 data, by another name.
        kwargs: ignored.
    """

    def __new__(cls, data=None, requires_grad=True, has_fp16_weights=False, CB=None, SCB=None, **kwargs):
        data = CB if CB is not None else torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.has_fp16_weights = has_fp16_weights
        self.SCB = SCB
        return self

    @property
    def CB(self) -> Tensor | None:
        return self.data if self.dtype == torch.int8 else None

    @CB.setter
    def CB(self, CB: Tensor | None) -> None:
        if CB is not None:  # None, with which bitsandbytes takes the data away, changes nothing
            self.data = CB

    @property
    def quantizes_itself(self) -> bool:
        return not self.has_fp16_weights

    @property
    def is_packed(self) -> bool:
        return self.dtype == torch.int8

    def pack(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        return ops.quantize_8bit(dense)

    def set_packed(self, CB: Tensor, SCB: Tensor) -> None:
        self.requires_grad_(False)
        self.data, self.SCB = CB, SCB

    def move_scales(self) -> None:
        if self.SCB is not None and not self.is_meta:
            self.SCB = self.SCB.to(self.device)
