"""The operations on packed weights, for NumPy arrays and torch tensors.

Outputs are new and of the kind, device and (unless said) dtype of the first argument. Everything
works without torch; torch tensors are handed to `bnbq.ops_torch`, which adds autograd, autocast
and torch.compile.

``x[..., k]`` and ``gy[..., n]`` are float32, bfloat16 or float16 with any strides; packed tensors
are contiguous. A weight ``[n, k]`` is packed as

====  =======================================================================================
4     ``qweight`` uint8 ``[n, k/2]`` and ``absmax`` float32 ``[n, k/blocksize]``; flat, ``[ceil(n*k/2)]``
      and ``[ceil(n*k/blocksize)]``, where ``k`` is no multiple of ``blocksize``. With double
      quantisation ``absmax`` is uint8 and ``absmax2`` ``[ceil(absmax.size/256)]`` and
      ``absmax_offset`` ``[1]`` are float32.
8     ``qweight`` int8 ``[n, k]`` and ``absmax`` float32 ``[n]``, or ``[n, ceil(k/blocksize)]``
====  =======================================================================================

All tensors lie on the CPU, or all on one CUDA device: then torch tensors, the work goes to torch's
current stream, and nothing waits for it.

Errors: TypeError for a wrong kind or dtype, ValueError for a wrong shape or value (on the CPU a weight
that is not finite is one), RuntimeError for a device, or from one. The message names the function and
the argument.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from . import _bnbq
from ._bnbq import (
    ABSMAX_BLOCK,
    BLOCKSIZES,
    batch_invariant,
    set_batch_invariant,
    set_thread_limit,
    thread_count,
)

__all__ = [
    "Packed4",
    "batch_invariant",
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_absmax",
    "linear4bit",
    "linear4bit_backward",
    "linear8bitlt",
    "linear8bitlt_backward",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_absmax",
    "set_batch_invariant",
    "set_thread_limit",
    "thread_count",
]


class Packed4(NamedTuple):
    """A packed 4-bit weight. The last two are None without double quantisation."""

    qweight: Any
    absmax: Any
    absmax2: Any = None
    absmax_offset: Any = None


_ops_torch, _Tensor = None, ()  # bnbq.ops_torch and torch.Tensor, set in this order once torch is there


def _torch_ops(x):
    """`bnbq.ops_torch` if x is a torch tensor, else None. torch is never imported for the question."""
    if isinstance(x, _Tensor):
        return _ops_torch
    return None if _Tensor or type(x) is np.ndarray else _find_torch(x)


def _find_torch(x):
    global _ops_torch, _Tensor
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, getattr(torch, "Tensor", ())):
        return None
    from . import ops_torch

    _ops_torch = ops_torch
    _Tensor = ops_torch.Tensor
    return ops_torch


def _array(x, function: str, name: str) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    if hasattr(type(x), "__dlpack__"):
        return np.from_dlpack(x)
    raise TypeError(f"{function}: {name} is a {type(x).__name__}, wanted a tensor or an array")


def check_blocksize(function: str, blocksize, zero: bool = False) -> None:
    if type(blocksize) is not int or not (blocksize in BLOCKSIZES or (zero and blocksize == 0)):
        kind = TypeError if type(blocksize) is not int else ValueError
        known = ", ".join(map(str, (0, *BLOCKSIZES) if zero else BLOCKSIZES))
        raise kind(f"{function}: blocksize is {blocksize!r}, wanted one of {known}")


def packed_shapes_4bit(shape, blocksize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of qweight and absmax for a weight of this shape."""
    if len(shape) > 1 and shape[-1] % blocksize == 0:
        return (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // blocksize)
    size = 1
    for length in shape:
        size *= length
    return (-(-size // 2),), (-(-size // blocksize),)


def absmax_shape_8bit(function: str, shape, blocksize: int) -> tuple[int, ...]:
    if len(shape) != 2:
        raise ValueError(f"{function}: w has shape {tuple(shape)}, wanted (n, k)")
    return (shape[0], -(-shape[1] // blocksize)) if blocksize else (shape[0],)


# ------------------------------------------------------------------ 4 bit


def quantize_4bit(w, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> Packed4:
    """Pack a weight of any shape; its blocks run over the flattened weight.

    quant_type is "nf4", "fp4" (both QLoRA, Dettmers et al. 2023) or "int4"; the bytes equal those
    of bitsandbytes. With double_quant the scales are packed too, by `quantize_absmax`.

    A weight that is not finite raises ValueError on the CPU. On a GPU nothing here waits to hear of it: the
    absmax of its block (with double_quant: absmax_offset) is then NaN or Inf. `bnbq.nn` looks and raises.
    """
    check_blocksize("quantize_4bit", blocksize)
    torch_ops = _torch_ops(w)
    if torch_ops is not None:
        qweight, absmax = torch_ops.quantize_4bit(w, quant_type, blocksize)
    else:
        w = _array(w, "quantize_4bit", "w")
        shapes = packed_shapes_4bit(w.shape, blocksize)
        qweight, absmax = np.empty(shapes[0], np.uint8), np.empty(shapes[1], np.float32)
        _bnbq.quantize_4bit(w, qweight, absmax, quant_type, blocksize)
    return Packed4(qweight, *quantize_absmax(absmax)) if double_quant else Packed4(qweight, absmax)


def dequantize_4bit(qweight, absmax, shape, *, absmax2=None, absmax_offset=None, quant_type: str = "nf4",
                    blocksize: int = 64, dtype=None):
    """The weight [shape] that a packed one stands for, rounded once to dtype (default float32)."""
    torch_ops = _torch_ops(qweight)
    if torch_ops is not None:
        return torch_ops.dequantize_4bit(qweight, absmax, absmax2, absmax_offset, shape, quant_type, blocksize, dtype)
    out = np.empty(shape, np.float32 if dtype is None else dtype)
    _bnbq.dequantize_4bit(qweight, absmax, absmax2, absmax_offset, out, quant_type, blocksize)
    return out


def quantize_absmax(absmax):
    """Second level of double quantisation (QLoRA, section 3): float32 scales -> (codes uint8 of the
    same shape, absmax2 float32 [ceil(size/256)], absmax_offset float32 [1])."""
    torch_ops = _torch_ops(absmax)
    if torch_ops is not None:
        return torch_ops.quantize_absmax(absmax)
    absmax = _array(absmax, "quantize_absmax", "absmax")
    codes, offset = np.empty(absmax.shape, np.uint8), np.empty(1, np.float32)
    absmax2 = np.empty(-(-absmax.size // ABSMAX_BLOCK), np.float32)
    _bnbq.quantize_absmax(absmax, codes, absmax2, offset)
    return codes, absmax2, offset


def dequantize_absmax(codes, absmax2, absmax_offset):
    """Scales from the three tensors of `quantize_absmax`, float32 of the shape of codes."""
    torch_ops = _torch_ops(codes)
    if torch_ops is not None:
        return torch_ops.dequantize_absmax(codes, absmax2, absmax_offset)
    codes = _array(codes, "dequantize_absmax", "codes")
    out = np.empty(codes.shape, np.float32)
    _bnbq.dequantize_absmax(codes, absmax2, absmax_offset, out)
    return out


def linear4bit(x, qweight, absmax, out_features: int, bias=None, *, absmax2=None, absmax_offset=None,
               quant_type: str = "nf4", blocksize: int = 64, compute_dtype=None, activations=None):
    """y[..., n] = x[..., k] . W[n, k]^T + bias[n], in x's dtype.

    x is rounded to compute_dtype first (None: not at all; otherwise "float32", "bfloat16",
    "float16" or the torch dtype) and sums are kept in float32. On torch tensors it has gradients
    for x and bias, and under autocast x is cast as `torch.nn.functional.linear` would.

    activations="int8" rounds x to int8 in blocks of min(blocksize, 64) columns, and the codebook with it: less
    exact (`bnbq.reference.linear_4bit_int8` defines it), and with AVX-512 VNNI faster. Gradients are those of the
    product without it. Where k is no multiple of blocksize, and on a GPU, it changes nothing.
    """
    torch_ops = _torch_ops(x)
    if torch_ops is not None:
        return torch_ops.linear4bit(x, qweight, absmax, out_features, bias, absmax2, absmax_offset, quant_type,
                                    blocksize, compute_dtype, activations)
    x = _array(x, "linear4bit", "x")
    return _bnbq.linear4bit(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type, blocksize,
                            compute_dtype, activations)


def linear4bit_backward(gy, qweight, absmax, in_features: int, *, absmax2=None, absmax_offset=None,
                        quant_type: str = "nf4", blocksize: int = 64, compute_dtype=None):
    """Gradient to the input: gx[..., k] = gy[..., n] . W[n, k], in gy's dtype; k is in_features."""
    torch_ops = _torch_ops(gy)
    if torch_ops is not None:
        return torch_ops.linear4bit_backward(gy, qweight, absmax, in_features, absmax2, absmax_offset, quant_type,
                                             blocksize, compute_dtype)
    gy = _array(gy, "linear4bit_backward", "gy")
    return _bnbq.linear4bit_backward(gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type, blocksize,
                                     compute_dtype)


# ------------------------------------------------------------------ 8 bit


def quantize_8bit(w, blocksize: int = 0):
    """w[n, k] -> (qweight int8 [n, k], absmax float32): rowwise absmax (LLM.int8(), Dettmers et al.
    2022), or one scale per blocksize columns of a row. Of weights that are not finite see `quantize_4bit`."""
    check_blocksize("quantize_8bit", blocksize, zero=True)
    torch_ops = _torch_ops(w)
    if torch_ops is not None:
        return torch_ops.quantize_8bit(w, blocksize)
    w = _array(w, "quantize_8bit", "w")
    absmax = np.empty(absmax_shape_8bit("quantize_8bit", w.shape, blocksize), np.float32)
    qweight = np.empty(w.shape, np.int8)
    _bnbq.quantize_8bit(w, qweight, absmax, blocksize)
    return qweight, absmax


def dequantize_8bit(qweight, absmax, *, blocksize: int = 0, dtype=None):
    """The weight [n, k] in dtype (default float32)."""
    torch_ops = _torch_ops(qweight)
    if torch_ops is not None:
        return torch_ops.dequantize_8bit(qweight, absmax, blocksize, dtype)
    qweight = _array(qweight, "dequantize_8bit", "qweight")
    out = np.empty(qweight.shape, np.float32 if dtype is None else dtype)
    _bnbq.dequantize_8bit(qweight, absmax, out, blocksize)
    return out


def linear8bitlt(x, qweight, absmax, bias=None, *, threshold: float = 6.0, blocksize: int = 0):
    """LLM.int8(): y[..., n] = x[..., k] . W[n, k]^T + bias[n], in x's dtype.

    Each row of x is quantised to int8. A column of x that holds an element of at least threshold (0: none) is
    not: it is multiplied as floats in every row, or only in the rows that need it when `set_batch_invariant`
    is on. Gradients are those of the dequantised weight.
    """
    torch_ops = _torch_ops(x)
    if torch_ops is not None:
        return torch_ops.linear8bitlt(x, qweight, absmax, bias, threshold, blocksize)
    x = _array(x, "linear8bitlt", "x")
    return _bnbq.linear8bitlt(x, qweight, absmax, bias, None, threshold, blocksize)


def linear8bitlt_backward(gy, qweight, absmax, *, blocksize: int = 0):
    """Gradient to the input: gx[..., k] = gy[..., n] . W[n, k], in gy's dtype."""
    torch_ops = _torch_ops(gy)
    if torch_ops is not None:
        return torch_ops.linear8bitlt_backward(gy, qweight, absmax, blocksize)
    gy = _array(gy, "linear8bitlt_backward", "gy")
    return _bnbq.linear8bitlt_backward(gy, qweight, absmax, None, blocksize)


if sys.modules.get("torch") is not None:  # so that nothing is left to import when torch.compile traces a first call
    from . import ops_torch as _ops_torch

    _Tensor = _ops_torch.Tensor
