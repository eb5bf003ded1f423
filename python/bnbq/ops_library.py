"""The ``bnbq::`` operators of torch's dispatcher: schemas, kernels, shapes for tracing, vmap.

Each is functional and its output's shape follows from its arguments alone, so that torch.compile and
torch.export keep them whole. On a GPU some products are a kernel of ours followed by cuBLAS: that is decided inside
the operator too. Arguments come in the order of the C functions, defaults live in `bnbq.ops`.
They have no gradients: registering those would cost every call in a compiled model 6 us (measured: 4 us ->
10 us on two cores of a Zen 4 server), so `bnbq.ops_autograd` wraps them. Imported once per process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _bnbq
from ._bnbq import ABSMAX_BLOCK
from .ops import absmax_shape_8bit, packed_shapes_4bit

PACKED4 = "Tensor qweight, Tensor absmax, Tensor? absmax2, Tensor? absmax_offset"
PACKED8 = "Tensor qweight, Tensor absmax"
FORMAT4 = "str quant_type, int blocksize"

DENSE_ROWS = 1024
"""From so many rows of x on, a 4-bit product on a GPU is the dense one with the dequantised weight. Counted for an
H200, not measured: dequantising takes as long as the dense product of 235 rows, and from about here on that is less
than what the fused kernel is slower by, which decodes the weight again for every tile of rows."""

library = torch.library.Library("bnbq", "DEF")


def define(schema: str, kernel, fake) -> None:
    """An operator with one kernel for all devices that C knows, and the shape of its result."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for backend in ("CPU", "CUDA"):
        library.impl(name, kernel, backend)
    torch.library.register_fake(f"bnbq::{name}", fake, lib=library)


# ------------------------------------------------------------------ weights


def quantize_4bit(w, quant_type, blocksize):
    qweight, absmax = quantize_4bit_fake(w, quant_type, blocksize)
    _bnbq.quantize_4bit(w.resolve_neg(), qweight, absmax, quant_type, blocksize)
    return qweight, absmax


def quantize_4bit_fake(w, quant_type, blocksize):
    qweight, absmax = packed_shapes_4bit(w.shape, blocksize)
    return w.new_empty(qweight, dtype=torch.uint8), w.new_empty(absmax, dtype=torch.float32)


def dequantize_4bit(qweight, absmax, absmax2, absmax_offset, shape, quant_type, blocksize, dtype):
    out = qweight.new_empty(shape, dtype=dtype)
    _bnbq.dequantize_4bit(qweight, absmax, absmax2, absmax_offset, out, quant_type, blocksize)
    return out


def dequantize_4bit_fake(qweight, absmax, absmax2, absmax_offset, shape, quant_type, blocksize, dtype):
    return qweight.new_empty(shape, dtype=dtype)


def quantize_absmax(absmax):
    out = quantize_absmax_fake(absmax)
    _bnbq.quantize_absmax(absmax, *out)
    return out


def quantize_absmax_fake(absmax):
    blocks = -(-absmax.numel() // ABSMAX_BLOCK)
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(1)


def dequantize_absmax(codes, absmax2, absmax_offset):
    out = dequantize_absmax_fake(codes, absmax2, absmax_offset)
    _bnbq.dequantize_absmax(codes, absmax2, absmax_offset, out)
    return out


def dequantize_absmax_fake(codes, absmax2, absmax_offset):
    return torch.empty_like(codes, dtype=torch.float32)


def quantize_8bit(w, blocksize):
    qweight, absmax = quantize_8bit_fake(w, blocksize)
    _bnbq.quantize_8bit(w.resolve_neg(), qweight, absmax, blocksize)
    return qweight, absmax


def quantize_8bit_fake(w, blocksize):
    absmax = absmax_shape_8bit("quantize_8bit", w.shape, blocksize)
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(absmax, dtype=torch.float32)


def dequantize_8bit(qweight, absmax, blocksize, dtype):
    out = qweight.new_empty(qweight.shape, dtype=dtype)
    _bnbq.dequantize_8bit(qweight, absmax, out, blocksize)
    return out


def dequantize_8bit_fake(qweight, absmax, blocksize, dtype):
    return qweight.new_empty(qweight.shape, dtype=dtype)


define(f"quantize_4bit(Tensor w, {FORMAT4}) -> (Tensor, Tensor)", quantize_4bit, quantize_4bit_fake)
define(f"dequantize_4bit({PACKED4}, SymInt[] shape, {FORMAT4}, ScalarType dtype) -> Tensor",
       dequantize_4bit, dequantize_4bit_fake)
define("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)", quantize_absmax, quantize_absmax_fake)
define("dequantize_absmax(Tensor codes, Tensor absmax2, Tensor absmax_offset) -> Tensor",
       dequantize_absmax, dequantize_absmax_fake)
define("quantize_8bit(Tensor w, int blocksize) -> (Tensor, Tensor)", quantize_8bit, quantize_8bit_fake)
define(f"dequantize_8bit({PACKED8}, int blocksize, ScalarType dtype) -> Tensor", dequantize_8bit, dequantize_8bit_fake)


# ------------------------------------------------------------------ linear


def columns(function: str, x: Tensor, name: str, wanted, what: str) -> None:
    if x.shape[-1] != wanted:
        raise ValueError(f"{function}: {name} has {x.shape[-1]} columns, the weight has {what} = {wanted}")


def linear4bit(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type, blocksize, compute,
               activations):
    x = x.resolve_neg()
    packed = qweight, absmax, absmax2, absmax_offset
    if not (on_gpu(x) and is_dense_faster(x, compute)):
        return _bnbq.linear4bit(x, *packed, bias, out_features, quant_type, blocksize, compute, activations)
    checked = x.new_empty((0, x.shape[-1]))  # no rows: nothing runs, and what is wrong is said
    _bnbq.linear4bit(checked, *packed, bias, out_features, quant_type, blocksize, compute, activations)
    w = dequantize_4bit(*packed, (out_features, x.shape[-1]), quant_type, blocksize, x.dtype)
    with torch.no_grad():  # like the kernel
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def is_dense_faster(x: Tensor, compute: str | None) -> bool:
    """Not where a row's result may not depend on the number of rows, nor where x is rounded to another dtype first:
    the dense product would round its result to it too."""
    return (x.shape[:-1].numel() >= DENSE_ROWS and not _bnbq.batch_invariant()
            and (compute is None or x.dtype == getattr(torch, compute)))


def linear4bit_fake(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type, blocksize, compute,
                    activations):
    if qweight.ndim == 2 and qweight.shape[1] > 1:
        columns("linear4bit", x, "x", qweight.shape[1] * 2, "k")
    return x.new_empty((*x.shape[:-1], out_features))


def linear4bit_backward(gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type, blocksize, compute):
    gy = gy.resolve_neg()
    packed = qweight, absmax, absmax2, absmax_offset
    if not on_gpu(gy):
        return _bnbq.linear4bit_backward(gy, *packed, in_features, quant_type, blocksize, compute)
    checked = gy.new_empty((0, *gy.shape[-1:]))
    _bnbq.linear4bit_backward(checked, *packed, in_features, quant_type, blocksize, compute)
    dtype = gy.dtype if compute is None else getattr(torch, compute)
    # Gradients of a larger range than float16 has keep it.
    dense = torch.float32 if dtype == torch.float16 and gy.dtype != dtype else dtype
    w = dequantize_4bit(*packed, (gy.shape[-1], in_features), quant_type, blocksize, dense)
    with torch.no_grad():
        return (gy.to(dtype).to(dense) @ w).to(gy.dtype)


def linear4bit_backward_fake(gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type, blocksize, compute):
    return gy.new_empty((*gy.shape[:-1], in_features))


def linear8bitlt(x, qweight, absmax, bias, threshold, blocksize):
    return _bnbq.linear8bitlt(x.resolve_neg(), qweight, absmax, bias, None, threshold, blocksize)


def linear8bitlt_fake(x, qweight, absmax, bias, threshold, blocksize):
    columns("linear8bitlt", x, "x", qweight.shape[1], "k")
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def linear8bitlt_backward(gy, qweight, absmax, blocksize):
    gy = gy.resolve_neg()
    if not on_gpu(gy):
        return _bnbq.linear8bitlt_backward(gy, qweight, absmax, None, blocksize)
    checked = gy.new_empty((0, *gy.shape[-1:]))
    _bnbq.linear8bitlt_backward(checked, qweight, absmax, None, blocksize)
    with torch.no_grad():
        return gy @ dequantize_8bit(qweight, absmax, blocksize, gy.dtype)


def linear8bitlt_backward_fake(gy, qweight, absmax, blocksize):
    return gy.new_empty((*gy.shape[:-1], qweight.shape[1]))


define(f"linear4bit(Tensor x, {PACKED4}, Tensor? bias, SymInt out_features, {FORMAT4}, str? compute_dtype, "
       "str? activations) -> Tensor", linear4bit, linear4bit_fake)
define(f"linear4bit_backward(Tensor gy, {PACKED4}, SymInt in_features, {FORMAT4}, str? compute_dtype) -> Tensor",
       linear4bit_backward, linear4bit_backward_fake)
define(f"linear8bitlt(Tensor x, {PACKED8}, Tensor? bias, float threshold, int blocksize) -> Tensor",
       linear8bitlt, linear8bitlt_fake)
define(f"linear8bitlt_backward(Tensor gy, {PACKED8}, int blocksize) -> Tensor",
       linear8bitlt_backward, linear8bitlt_backward_fake)


def over_activations(name: str):
    """vmap over the activations only: the new dimension becomes a leading one."""

    def rule(info, in_dims, x, *arguments):
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(f"bnbq::{name}: vmap over a packed weight or its bias")
        return getattr(torch.ops.bnbq, name)(x.movedim(in_dims[0], 0), *arguments), 0

    return rule


if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
    for _name in ("linear4bit", "linear4bit_backward", "linear8bitlt", "linear8bitlt_backward"):
        torch.library.register_vmap(f"bnbq::{_name}", over_activations(_name), lib=library)
