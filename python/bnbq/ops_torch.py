"""The operations of `bnbq.ops` on torch tensors: how a call reaches C.

======================================  ============================================================
plain tensors, nothing to differentiate  straight to C
x or bias needs a gradient, torch.func   `torch.autograd.Function`
torch.compile, fake and meta tensors,    the dispatcher's ``bnbq::`` operators (`bnbq.ops_library`),
subclasses, dispatch modes               which have shapes for tracing and gradients
======================================  ============================================================

The first row is why this file looks as it does: with a small layer the whole call takes some 3 us, as
much as the dispatcher alone would, so every question asked on the way counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from . import _bnbq, ops_library

COMPUTE_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
PLAIN = (Tensor, Parameter)

# Absent before torch 2.5: then `autocast` asks properly.
maybe_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def compute_name(function: str, compute_dtype) -> str:
    name = COMPUTE_DTYPES.get(compute_dtype) if isinstance(compute_dtype, (str, torch.dtype)) else None
    if name is None:
        kind = ValueError if isinstance(compute_dtype, (str, torch.dtype)) else TypeError
        raise kind(f"{function}: compute_dtype is {compute_dtype!r}, wanted float32, bfloat16, float16 or None")
    return name


def through_dispatcher(tensor: Tensor) -> bool:
    """True if somebody wants to see the call: a tracer, a dispatch mode or the tensor's own class."""
    return (
        is_dynamo_compiling()
        or type(tensor) not in PLAIN
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
    )


def autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` would take it."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def call(name: str, *arguments):
    """The kernel; the dispatcher for what C cannot read and it can. Views that are negated on reading
    (``z.conj().imag``) are made real."""
    try:
        return getattr(ops_library, name)(*arguments)
    except RuntimeError:
        op = getattr(torch.ops.bnbq, name)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if any(t.is_meta or type(t) not in PLAIN for t in tensors):
            return op(*arguments)
        if any(t.is_neg() for t in tensors):
            return op(*[a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments])
        raise


# ------------------------------------------------------------------ linear
#
# autograd.Function, not the gradients registered with the operators: a third of the cost in eager mode, and
# torch.func can use it.


class Linear4bit(torch.autograd.Function):
    setup_context = staticmethod(ops_library.save_linear4bit)
    vmap = staticmethod(ops_library.batched("linear4bit"))

    @staticmethod
    def forward(*inputs):
        return call("linear4bit", *inputs)

    @staticmethod
    def backward(ctx, gy):
        return ops_library.linear4bit_gradients(ctx, gy, backward_4bit)


class Gradient4bit(torch.autograd.Function):
    setup_context = staticmethod(ops_library.save_linear4bit_backward)
    vmap = staticmethod(ops_library.batched("linear4bit_backward"))

    @staticmethod
    def forward(*inputs):
        return call("linear4bit_backward", *inputs)

    @staticmethod
    def backward(ctx, ggx):
        return ops_library.linear4bit_backward_gradients(ctx, ggx, Linear4bit.apply)


class Linear8bitLt(torch.autograd.Function):
    setup_context = staticmethod(ops_library.save_linear8bitlt)
    vmap = staticmethod(ops_library.batched("linear8bitlt"))

    @staticmethod
    def forward(*inputs):
        return call("linear8bitlt", *inputs)

    @staticmethod
    def backward(ctx, gy):
        return ops_library.linear8bitlt_gradients(ctx, gy, backward_8bit)


class Gradient8bit(torch.autograd.Function):
    setup_context = staticmethod(ops_library.save_linear8bitlt_backward)
    vmap = staticmethod(ops_library.batched("linear8bitlt_backward"))

    @staticmethod
    def forward(*inputs):
        return call("linear8bitlt_backward", *inputs)

    @staticmethod
    def backward(ctx, ggx):
        return ops_library.linear8bitlt_backward_gradients(ctx, ggx)


def is_differentiated(x: Tensor, bias: Tensor | None = None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def run(name: str, function, differentiate: bool, *arguments):
    """The first of the three ways of this file's head that fits."""
    if through_dispatcher(arguments[0]):
        return getattr(torch.ops.bnbq, name)(*arguments)
    if differentiate or maybe_current_level() is not None:
        return function.apply(*arguments)
    return call(name, *arguments)


def linear4bit(x, qweight, absmax, out_features, bias=None, absmax2=None, absmax_offset=None, quant_type="nf4",
               blocksize=64, compute_dtype=None):
    if compute_dtype is not None:
        compute_dtype = compute_name("linear4bit", compute_dtype)
    if is_dynamo_compiling() or maybe_autocast():
        x = autocast(x)
    elif not (through_dispatcher(x) or is_differentiated(x, bias)):
        try:  # as run() would, without the steps in between
            return _bnbq.linear4bit(x, qweight, absmax, absmax2, absmax_offset, bias, out_features, quant_type,
                                    blocksize, compute_dtype)
        except RuntimeError:
            pass
    return run("linear4bit", Linear4bit, is_differentiated(x, bias), x, qweight, absmax, absmax2, absmax_offset, bias,
               out_features, quant_type, blocksize, compute_dtype)


def linear8bitlt(x, qweight, absmax, bias=None, threshold=6.0, blocksize=0):
    if is_dynamo_compiling() or maybe_autocast():
        x = autocast(x)
    elif not (through_dispatcher(x) or is_differentiated(x, bias)):
        try:
            return _bnbq.linear8bitlt(x, qweight, absmax, bias, None, threshold, blocksize)
        except RuntimeError:
            pass
    return run("linear8bitlt", Linear8bitLt, is_differentiated(x, bias), x, qweight, absmax, bias, threshold, blocksize)


def backward_4bit(*arguments):
    return run("linear4bit_backward", Gradient4bit, is_differentiated(arguments[0]), *arguments)


def backward_8bit(*arguments):
    return run("linear8bitlt_backward", Gradient8bit, is_differentiated(arguments[0]), *arguments)


def linear4bit_backward(gy, qweight, absmax, in_features, absmax2=None, absmax_offset=None, quant_type="nf4",
                        blocksize=64, compute_dtype=None):
    if compute_dtype is not None:
        compute_dtype = compute_name("linear4bit_backward", compute_dtype)
    return backward_4bit(gy, qweight, absmax, absmax2, absmax_offset, in_features, quant_type, blocksize, compute_dtype)


def linear8bitlt_backward(gy, qweight, absmax, blocksize=0):
    return backward_8bit(gy, qweight, absmax, blocksize)


# ------------------------------------------------------------------ weights


def pack(name: str, *arguments):
    """An operation on weights: never differentiated."""
    with torch.no_grad():
        if through_dispatcher(arguments[0]):
            return getattr(torch.ops.bnbq, name)(*arguments)
        return call(name, *arguments)


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
