"""QuantState, what bitsandbytes keeps beside packed bytes, and the calls of `bnbq.ops` that it describes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint_bnb, ops
from ..ops import Packed4, packed_shapes_4bit
from ..reference import ABSMAX_BLOCK

DYNAMIC_MAP = checkpoint_bnb.dynamic_map()
PACKED_KEY = "quant_state.bitsandbytes__"


class QuantState:
    """Scales and format of a tensor that was quantised in blocks.

    Attributes:
        absmax: f32 [blocks]; with double quantisation u8 codes of ``state2``.
        shape, dtype: of the tensor that was quantised.
        code: f32 [16] (4 bit) or [256] (8 bit), the value of each code.
        blocksize: elements per scale.
        quant_type: "nf4", "fp4", or None for 8 bit.
        offset, state2: f32 [] and the QuantState of ``absmax``, or None.
        nested: whether there is a state2.
    """

    valid_quant_types = checkpoint_bnb.BNB_QUANT_TYPES
    # For a from_dict of others' in place of the one here.
    valid_qs_type_keys = [f"bitsandbytes__{name}" for name in valid_quant_types]
    valid_qs_keys = """
        absmax quant_map nested_absmax nested_quant_map quant_state quant_type blocksize dtype shape nested_blocksize
        nested_dtype nested_offset
    """.split()

    def __init__(
        self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None
    ):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    @property
    def code(self) -> Tensor | None:
        return self._code

    @code.setter
    def code(self, code: Tensor | None) -> None:
        # Asked once per tensor, not once per product: on a GPU the question waits for the device.
        self._code = code
        self._is_dynamic = code is not None and is_dynamic_map(code)

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():  # by the setter of ``code``, which bitsandbytes' pickles have
            setattr(self, name, value)

    def __getattr__(self, name: str):
        """FSDP finds the tensors of a state dict by their dotted names, "quant_state.bitsandbytes__nf4" included."""
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.quant_type}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    def __getitem__(self, index):
        """The list that was the state before QuantState existed."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device) -> QuantState:
        """The inverse of `as_dict`, packed or not; names may have a prefix ("weight.absmax").

        Raises ValueError for a packed part that is damaged, missing or there twice.
        """
        items = {key.rpartition(".")[2]: value for key, value in qs_dict.items()}
        packed = [key for key in items if key.startswith("bitsandbytes__")]
        if len(packed) > 1 or not (packed or "quant_type" in items):
            raise ValueError(
                f"QuantState.from_dict: got {', '.join(sorted(qs_dict)) or 'nothing'}; wanted one of "
                f"{', '.join(PACKED_KEY + name for name in cls.valid_quant_types)}, or quant_type, blocksize, ..."
            )
        if packed:
            items.update(checkpoint_bnb.read_quant_state(items.pop(packed[0]), "QuantState.from_dict", matrix=False))
        needed = {"absmax", "quant_map", "blocksize", "dtype"}
        if "nested_absmax" in items:
            needed |= {"nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"}
        if not needed <= items.keys():
            raise ValueError(f"QuantState.from_dict: missing {', '.join(sorted(needed - items.keys()))}")
        absmax, offset, state2 = items["absmax"], None, None
        if "nested_absmax" in items:
            offset = torch.tensor(float(items["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=items["nested_absmax"].to(device),
                blocksize=items["nested_blocksize"],
                code=items["nested_quant_map"].to(device),
                dtype=float_dtype(items["nested_dtype"]),
            )
        elif absmax.dim() == 2 and items.get("shape"):  # what bitsandbytes writes after a forward on some CPUs
            absmax, note = checkpoint_bnb.read_absmax(absmax, items["shape"][0], "QuantState.from_dict")
            if note is not None:
                warnings.warn(note, stacklevel=2)
        return cls(
            quant_type=items.get("quant_type"),
            absmax=absmax.to(device),
            blocksize=items["blocksize"],
            code=items["quant_map"].to(device),
            dtype=float_dtype(items["dtype"]),
            shape=None if items.get("shape") is None else torch.Size(items["shape"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Tensors and settings by the names of a state dict; packed: only tensors, one with the settings as JSON."""
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        settings = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            tensors.update(nested_absmax=self.state2.absmax, nested_quant_map=self.state2.code)
            settings.update(
                nested_blocksize=self.state2.blocksize,
                nested_dtype=str(self.state2.dtype).removeprefix("torch."),
                nested_offset=self.offset.item(),
            )
        if not packed or self.quant_type is None:
            return {**tensors, **settings}
        tensors[PACKED_KEY + self.quant_type] = checkpoint_bnb.pack_quant_state(settings)
        return tensors

    def to(self, device) -> None:
        """Move the tensors, in place."""
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != torch.device(device):
                setattr(self, name, tensor.to(device))
        if self.nested:
            self.state2.to(device)

    def __eq__(self, other) -> bool:
        if not isinstance(other, QuantState):
            return False
        return all(
            equal(getattr(self, name), getattr(other, name))
            for name in ("absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2")
        )

    __hash__ = None


def equal(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b.to(a.device), atol=1e-6)
    return a == b


def float_dtype(dtype) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else checkpoint_bnb.float_dtype(dtype, "QuantState: dtype")


def is_dynamic_map(code: Tensor) -> bool:
    """Whether a code of 256 is the one that the C core holds for double-quantised scales. False where its values
    cannot be known: on meta, in a tracer."""
    if type(code) not in (Tensor, torch.nn.Parameter) or code.is_meta or code.dtype != torch.float32:
        return False
    return code.numel() == 256 and torch.equal(code.flatten(), DYNAMIC_MAP.to(code.device))


# ------------------------------------------------------------------ the C core


def core_weight(packed: Tensor, state: QuantState) -> Packed4:
    """A packed 4-bit weight as `bnbq.ops` takes it: views of the same bytes and scales.

    packed may have any shape and storage dtype. Double-quantised scales in a form that the core does not hold
    (a code or block of their own) are decoded to f32. Raises ValueError where sizes do not fit ``state.shape``.
    """
    qweight_shape, absmax_shape = packed_shapes_4bit(state.shape, state.blocksize)
    qweight = packed.reshape(-1).view(torch.uint8)
    wanted = -(-state.shape.numel() // 2), -(-state.shape.numel() // state.blocksize)
    if (qweight.numel(), state.absmax.numel()) != wanted:
        raise ValueError(
            f"the packed weight has {qweight.numel()} bytes and {state.absmax.numel()} scales, wanted {wanted[0]} and "
            f"{wanted[1]} for shape {list(state.shape)} and blocksize {state.blocksize}"
        )
    qweight, state2 = qweight.view(qweight_shape), state.state2
    if not state.nested:
        return Packed4(qweight, state.absmax.to(torch.float32).reshape(absmax_shape))
    if state2._is_dynamic and state2.blocksize == ABSMAX_BLOCK and state2.dtype == torch.float32:
        offset = state.offset.to(torch.float32).reshape(1)
        return Packed4(qweight, state.absmax.reshape(absmax_shape), state2.absmax.to(torch.float32), offset)
    return Packed4(qweight, decoded_absmax(state).reshape(absmax_shape))


def dequantize_state(packed: Tensor, state: QuantState) -> Tensor:
    """The dense tensor, ``state.shape`` in ``state.dtype``."""
    weight = core_weight(packed, state)
    return ops.dequantize_4bit(
        weight.qweight,
        weight.absmax,
        state.shape,
        absmax2=weight.absmax2,
        absmax_offset=weight.absmax_offset,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        dtype=state.dtype,
    )


def product_4bit(A: Tensor, packed: Tensor, state: QuantState, bias=None, compute_dtype=None) -> Tensor:
    """A[..., k] . W[n, k]^T + bias[n] in A's dtype by the C core, with gradients for A and bias."""
    weight = core_weight(packed, state)
    result = ops.linear4bit(
        A,
        weight.qweight,
        weight.absmax,
        state.shape[0],
        bias,
        absmax2=weight.absmax2,
        absmax_offset=weight.absmax_offset,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        compute_dtype=compute_dtype,
    )
    return result.to(A.dtype)  # autocast may have chosen another


def decoded_absmax(state: QuantState) -> Tensor:
    """Double-quantised scales of any form, f32 [blocks]."""
    state2 = state.state2
    scales = torch.ops.bnbq_bitsandbytes.dequantize_blockwise(
        state.absmax, state2.absmax, state2.code, state2.blocksize, state2.dtype
    )
    return (scales + state.offset).to(torch.float32)


def state_from_core(weight: Packed4, quant_type: str, blocksize: int, shape, dtype: torch.dtype) -> QuantState:
    """The inverse of `core_weight`: the scales keep their memory."""
    device, offset, state2 = weight.absmax.device, None, None
    if weight.absmax2 is not None:
        offset = weight.absmax_offset.reshape(())
        code = DYNAMIC_MAP.to(device, copy=True)
        state2 = QuantState(weight.absmax2, code=code, blocksize=ABSMAX_BLOCK, dtype=torch.float32)
    return QuantState(
        absmax=weight.absmax.reshape(-1),
        shape=torch.Size(shape),
        # Not shared between states: safetensors refuses tensors that share memory.
        code=checkpoint_bnb.codebook(quant_type).to(device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
