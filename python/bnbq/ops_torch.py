"""The operations of `bnbq.ops` on torch tensors: how a call reaches C.

======================================  ============================================================
plain CPU tensors without gradients      straight to C
plain CUDA tensors without gradients     `bnbq.ops_library`, where some products go on to cuBLAS
x or bias needs a gradient, torch.func   `torch.autograd.Function` (`bnbq.ops_autograd`)
torch.compile, fake and meta tensors,    the dispatcher's ``bnbq::`` operators (`bnbq.ops_library`)
subclasses, dispatch modes
======================================  ============================================================

The first row is why this file looks as it does: with a small layer the whole call takes 2 us, as much as
the dispatcher alone would, so every question asked on the way counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _bnbq, ops_library
from .ops_autograd import compute, differentiable, is_differentiated, is_watched

COMPUTE_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}

# Absent from older torch: then `autocast` asks in full.
maybe_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def compute_name(function: str, compute_dtype) -> str:
    known = isinstance(compute_dtype, (str, torch.dtype))
    name = COMPUTE_DTYPES.get(compute_dtype) if known else None
    if name is None:
        error = f"{function}: compute_dtype is {compute_dtype!r}, wanted float32, bfloat16, float16 or None"
        raise (ValueError if known else TypeError)(error)
    return name


def autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` would take it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


# ------------------------------------------------------------------ linear


def linear4bit(x, qweight, absmax, out_features, bias=None, absmax2=None, absmax_offset=None, quant_type="nf4",
               blocksize=64, compute_dtype=None, activations=None):
    if compute_dtype is not None:
        compute_dtype = compute_name("linear4bit", compute_dtype)
    if is_dynamo_compiling():
        op = torch.ops.bnbq.linear4bit_autograd if is_differentiated(x, bias) else torch.ops.bnbq.linear4bit
        return op(autocast(x), qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type, blocksize,
                  compute_dtype, activations)
    if maybe_autocast():
        x = autocast(x)
    if not (x.is_cuda or is_differentiated(x, bias) or is_watched(x)):
        try:
            return _bnbq.linear4bit(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type,
                                    blocksize, compute_dtype, activations)
        except RuntimeError:
            pass  # raised again below if nothing else helps
    return differentiable("linear4bit", x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type,
                          blocksize, compute_dtype, activations)


def linear8bitlt(x, qweight, absmax, bias=None, threshold=6.0, blocksize=0):
    if is_dynamo_compiling():
        op = torch.ops.bnbq.linear8bitlt_autograd if is_differentiated(x, bias) else torch.ops.bnbq.linear8bitlt
        return op(autocast(x), qweight, absmax, bias, threshold, blocksize)
    if maybe_autocast():
        x = autocast(x)
    if not (x.is_cuda or is_differentiated(x, bias) or is_watched(x)):
        try:
            return _bnbq.linear8bitlt(x, qweight, absmax, bias, None, threshold, blocksize)
        except RuntimeError:
            pass  # raised again below if nothing else helps
    return differentiable("linear8bitlt", x, qweight, absmax, bias, threshold, blocksize)


def linear4bit_backward(gy, qweight, absmax, in_features, absmax2=None, absmax_offset=None, quant_type="nf4",
                        blocksize=64, compute_dtype=None):
    if compute_dtype is not None:
        compute_dtype = compute_name("linear4bit_backward", compute_dtype)
    return without_dynamo("linear4bit_backward", gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type,
                          blocksize, compute_dtype)


def linear8bitlt_backward(gy, qweight, absmax, blocksize=0):
    return without_dynamo("linear8bitlt_backward", gy, qweight, absmax, blocksize)


def without_dynamo(name: str, *arguments):
    if is_dynamo_compiling():
        return getattr(torch.ops.bnbq, name)(*arguments)
    return differentiable(name, *arguments)


# ------------------------------------------------------------------ weights


def pack(name: str, *arguments):
    """An operation on weights: never differentiated."""
    with torch.no_grad():
        return getattr(torch.ops.bnbq, name)(*arguments) if is_dynamo_compiling() else compute(name, *arguments)


def check_finite(function: str, w: Tensor, scales: Tensor) -> None:
    """ValueError if ``w`` had a NaN or an Inf: on a GPU quantising does not wait to hear of it, but then ``scales``
    (absmax, or absmax_offset) is not finite either. Waits for the GPU; does nothing where that cannot be, while a
    CUDA graph is captured or a model compiled, and on the CPU, where quantising has raised it."""
    if not ops_library.on_gpu(w) or is_dynamo_compiling() or torch.cuda.is_current_stream_capturing():
        return
    if not torch.isfinite(scales).all():
        index = tuple(torch.nonzero(~torch.isfinite(w))[0].tolist())
        raise ValueError(f"{function}: w has {w[index].item()} at index {index}")


def quantize_4bit(w, quant_type="nf4", blocksize=64):
    return pack("quantize_4bit", w, quant_type, blocksize)


def dequantize_4bit(qweight, absmax, absmax2, absmax_offset, shape, quant_type="nf4", blocksize=64, dtype=None):
    return pack("dequantize_4bit", qweight, absmax, absmax2, absmax_offset, list(shape), quant_type, blocksize,
               dtype or torch.float32)


def quantize_absmax(absmax):
    return pack("quantize_absmax", absmax)


def dequantize_absmax(codes, absmax2, absmax_offset):
    return pack("dequantize_absmax", codes, absmax2, absmax_offset)


def quantize_8bit(w, blocksize=0):
    return pack("quantize_8bit", w, blocksize)


def dequantize_8bit(qweight, absmax, blocksize=0, dtype=None):
    return pack("dequantize_8bit", qweight, absmax, blocksize, dtype or torch.float32)
