"""The ``bnbq::`` operators of torch's dispatcher: schemas, kernels, shapes for tracing, gradients, vmap.

Each is functional and its output's shape follows from its arguments alone, so that torch.compile and
torch.export keep them whole. Arguments come in the order of the C functions, defaults live in `bnbq.ops`.
Imported by `bnbq.ops_torch`, once per process.
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

library = torch.library.Library("bnbq", "DEF")


def define(schema: str, kernel, fake) -> None:
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


def linear4bit(x, *arguments):
    return _bnbq.linear4bit(x.resolve_neg(), *arguments)


def linear4bit_fake(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type, blocksize, compute):
    if qweight.ndim == 2 and qweight.shape[1] > 1:
        columns("linear4bit", x, "x", qweight.shape[1] * 2, "k")
    return x.new_empty((*x.shape[:-1], out_features))


def linear4bit_backward(gy, *arguments):
    return _bnbq.linear4bit_backward(gy.resolve_neg(), *arguments)


def linear4bit_backward_fake(gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type, blocksize, compute):
    return gy.new_empty((*gy.shape[:-1], in_features))


def linear8bitlt(x, qweight, absmax, bias, threshold, blocksize):
    return _bnbq.linear8bitlt(x.resolve_neg(), qweight, absmax, bias, None, threshold, blocksize)


def linear8bitlt_fake(x, qweight, absmax, bias, threshold, blocksize):
    columns("linear8bitlt", x, "x", qweight.shape[1], "k")
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def linear8bitlt_backward(gy, qweight, absmax, blocksize):
    return _bnbq.linear8bitlt_backward(gy.resolve_neg(), qweight, absmax, None, blocksize)


def linear8bitlt_backward_fake(gy, qweight, absmax, blocksize):
    return gy.new_empty((*gy.shape[:-1], qweight.shape[1]))


define(f"linear4bit(Tensor x, {PACKED4}, Tensor? bias, SymInt out_features, {FORMAT4}, str? compute_dtype) -> Tensor",
       linear4bit, linear4bit_fake)
define(f"linear4bit_backward(Tensor gy, {PACKED4}, SymInt in_features, {FORMAT4}, str? compute_dtype) -> Tensor",
       linear4bit_backward, linear4bit_backward_fake)
define(f"linear8bitlt(Tensor x, {PACKED8}, Tensor? bias, float threshold, int blocksize) -> Tensor",
       linear8bitlt, linear8bitlt_fake)
define(f"linear8bitlt_backward(Tensor gy, {PACKED8}, int blocksize) -> Tensor",
       linear8bitlt_backward, linear8bitlt_backward_fake)


# ------------------------------------------------------------------ gradients
#
# Linear in x, so the second derivative is the product again. What is saved are the packed tensors.
# `bnbq.ops_torch` uses the same functions in eager mode.


def bias_gradient(gy: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over all rows in float32, whatever gy is."""
    return gy.reshape(-1, gy.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


def save_linear4bit(ctx, inputs, output) -> None:
    x, qweight, absmax, absmax2, absmax_offset, bias, _, *settings = inputs
    ctx.save_for_backward(qweight, absmax, absmax2, absmax_offset)
    ctx.settings = x.shape[-1], *settings
    ctx.bias_dtype = None if bias is None else bias.dtype


def save_linear4bit_backward(ctx, inputs, output) -> None:
    gy, qweight, absmax, absmax2, absmax_offset, _, *settings = inputs
    ctx.save_for_backward(qweight, absmax, absmax2, absmax_offset)
    ctx.settings = None, gy.shape[-1], *settings  # no bias


def save_linear8bitlt(ctx, inputs, output) -> None:
    _, qweight, absmax, bias, _, blocksize = inputs
    ctx.save_for_backward(qweight, absmax)
    ctx.blocksize = blocksize
    ctx.bias_dtype = None if bias is None else bias.dtype


def save_linear8bitlt_backward(ctx, inputs, output) -> None:
    _, qweight, absmax, ctx.blocksize = inputs
    ctx.save_for_backward(qweight, absmax)


def linear4bit_gradients(ctx, gy, product=None):
    product = product or torch.ops.bnbq.linear4bit_backward
    gx = product(gy, *ctx.saved_tensors, *ctx.settings) if ctx.needs_input_grad[0] else None
    gb = bias_gradient(gy, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return gx, None, None, None, None, gb, None, None, None, None


def linear4bit_backward_gradients(ctx, ggx, product=None):
    product = product or torch.ops.bnbq.linear4bit
    return product(ggx, *ctx.saved_tensors, *ctx.settings), *[None] * 8


def linear8bitlt_gradients(ctx, gy, product=None):
    product = product or torch.ops.bnbq.linear8bitlt_backward
    gx = product(gy, *ctx.saved_tensors, ctx.blocksize) if ctx.needs_input_grad[0] else None
    gb = bias_gradient(gy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return gx, None, None, gb, None, None


def linear8bitlt_backward_gradients(ctx, ggx):
    w = torch.ops.bnbq.dequantize_8bit(*ctx.saved_tensors, ctx.blocksize, ggx.dtype)
    return ggx @ w.T, None, None, None


def batched(name: str):
    """vmap over the activations only: the new dimension becomes a leading one."""

    def rule(info, in_dims, x, *arguments):
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(f"bnbq::{name}: vmap over a packed weight or its bias")
        return getattr(torch.ops.bnbq, name)(x.movedim(in_dims[0], 0), *arguments), 0

    return rule


for _name in ("linear4bit", "linear4bit_backward", "linear8bitlt", "linear8bitlt_backward"):
    torch.library.register_autograd(
        f"bnbq::{_name}", globals()[f"{_name}_gradients"], setup_context=globals()[f"save_{_name}"], lib=library
    )
    if hasattr(torch.library, "register_vmap"):  # torch >= 2.5
        torch.library.register_vmap(f"bnbq::{_name}", batched(_name), lib=library)
