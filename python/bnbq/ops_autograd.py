"""Gradients of the linear operations: for x and bias; the packed weight is frozen and is all that is saved.

The products are linear in x, so each is the other's derivative and derivatives of any order exist; rounding
activations to int8 is left out of them. Every function comes twice, because torch.func wants saving apart from
computing and torch then binds the arguments with inspect.signature, which takes ten times as long as the product of
a small layer.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import ops_library

PLAIN = (Tensor, Parameter)


def is_watched(tensor: Tensor) -> bool:
    """True if somebody wants to see the call: a dispatch mode, a tracer or the tensor's own class."""
    return type(tensor) not in PLAIN or _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


def is_differentiated(x: Tensor, bias: Tensor | None = None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def compute(name: str, *arguments):
    """The operation without gradients: the kernel, or the operator for those who watch and for what only it can
    read. Views that are negated on reading (``z.conj().imag``) are made real."""
    op = getattr(torch.ops.bnbq, name)
    if is_watched(arguments[0]):
        return op(*arguments)
    try:
        return getattr(ops_library, name)(*arguments)
    except RuntimeError:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if maybe_current_level() is not None or any(t.is_meta or type(t) not in PLAIN for t in tensors):
            return op(*arguments)
        if any(t.is_neg() for t in tensors):
            return op(*[a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments])
        raise


def differentiable(name: str, *arguments):
    """The operation with gradients where they are asked for: of the first argument, or of bias."""
    x, bias = arguments[0], arguments[BIAS[name]] if name in BIAS else None
    if maybe_current_level() is not None:
        return FOR_TORCH_FUNC[name].apply(*arguments)
    return EAGER[name].apply(*arguments) if is_differentiated(x, bias) else compute(name, *arguments)


BIAS = {"linear4bit": 5, "linear8bitlt": 3}


def bias_gradient(ctx, gy: Tensor) -> Tensor | None:
    """Sum over all rows in float32, whatever gy is."""
    if not ctx.needs_input_grad[ctx.bias]:
        return None
    return gy.reshape(-1, gy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)


class Linear4bit(torch.autograd.Function):
    @staticmethod
    def save(ctx, inputs, output=None):
        x, qweight, absmax, absmax2, absmax_offset, bias, _, *settings, _ = inputs  # no activations
        ctx.save_for_backward(qweight, absmax, absmax2, absmax_offset)
        ctx.settings = x.shape[-1], *settings
        ctx.bias, ctx.bias_dtype = BIAS["linear4bit"], None if bias is None else bias.dtype

    @staticmethod
    def forward(ctx, *inputs):
        Linear4bit.save(ctx, inputs)
        return compute("linear4bit", *inputs)

    @staticmethod
    def backward(ctx, gy):
        gx = None
        if ctx.needs_input_grad[0]:
            gx = differentiable("linear4bit_backward", gy, *ctx.saved_tensors, *ctx.settings)
        return gx, None, None, None, None, bias_gradient(ctx, gy), *[None] * 5


class Linear4bitBackward(torch.autograd.Function):
    @staticmethod
    def save(ctx, inputs, output=None):
        gy, qweight, absmax, absmax2, absmax_offset, _, *settings = inputs
        ctx.save_for_backward(qweight, absmax, absmax2, absmax_offset)
        ctx.settings = None, gy.shape[-1], *settings, None  # no bias, no rounding to int8

    @staticmethod
    def forward(ctx, *inputs):
        Linear4bitBackward.save(ctx, inputs)
        return compute("linear4bit_backward", *inputs)

    @staticmethod
    def backward(ctx, ggx):
        return differentiable("linear4bit", ggx, *ctx.saved_tensors, *ctx.settings), *[None] * 8


class Linear8bitLt(torch.autograd.Function):
    @staticmethod
    def save(ctx, inputs, output=None):
        _, qweight, absmax, bias, _, ctx.blocksize = inputs
        ctx.save_for_backward(qweight, absmax)
        ctx.bias, ctx.bias_dtype = BIAS["linear8bitlt"], None if bias is None else bias.dtype

    @staticmethod
    def forward(ctx, *inputs):
        Linear8bitLt.save(ctx, inputs)
        return compute("linear8bitlt", *inputs)

    @staticmethod
    def backward(ctx, gy):
        gx = None
        if ctx.needs_input_grad[0]:
            gx = differentiable("linear8bitlt_backward", gy, *ctx.saved_tensors, ctx.blocksize)
        return gx, None, None, bias_gradient(ctx, gy), None, None


class Linear8bitLtBackward(torch.autograd.Function):
    """Its own derivative is a float product: the gradient of LLM.int8() is that of the dequantised weight."""

    @staticmethod
    def save(ctx, inputs, output=None):
        _, qweight, absmax, ctx.blocksize = inputs
        ctx.save_for_backward(qweight, absmax)

    @staticmethod
    def forward(ctx, *inputs):
        Linear8bitLtBackward.save(ctx, inputs)
        return compute("linear8bitlt_backward", *inputs)

    @staticmethod
    def backward(ctx, ggx):
        w = compute("dequantize_8bit", *ctx.saved_tensors, ctx.blocksize, ggx.dtype)
        return ggx @ w.T, None, None, None


EAGER = {
    "linear4bit": Linear4bit,
    "linear4bit_backward": Linear4bitBackward,
    "linear8bitlt": Linear8bitLt,
    "linear8bitlt_backward": Linear8bitLtBackward,
}
FOR_TORCH_FUNC = {
    name: type(
        function.__name__,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(partial(compute, name)),
            "setup_context": staticmethod(function.save),
            "backward": staticmethod(function.backward),
            "vmap": staticmethod(ops_library.over_activations(name)),
        },
    )
    for name, function in EAGER.items()
}

# What torch.compile sees where a gradient is needed. Composite: the tracer looks inside and keeps the plain
# operators of forward and backward.
for _name in BIAS:
    _schema = str(getattr(torch.ops.bnbq, _name).default._schema).removeprefix("bnbq::")
    ops_library.library.define(_schema.replace(_name, f"{_name}_autograd", 1))
    ops_library.library.impl(f"{_name}_autograd", EAGER[_name].apply, "CompositeImplicitAutograd")
