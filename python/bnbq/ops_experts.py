"""Products with the packed weights of experts: the rows of x, sorted by expert, each with its expert's matrix.

``x[m, k]`` and ``ends`` int64 ``[experts]``: expert e has the rows ``ends[e - 1] .. ends[e]``, and rows from
``ends[-1]`` on have no expert; their results and gradients are zero. The packed tensors are those of `bnbq.ops` with a
leading dimension for the experts (``qweight`` uint8 ``[experts, n, k/2]`` ...), each expert packed on its own, and
``bias`` is ``[experts, n]`` or None. A row's result is what `ops.linear4bit` or `ops.linear8bitlt` gives for its
expert's rows, bit for bit; experts without rows are not read.

Gradients exist for x and bias, once. torch.compile keeps the operators whole: their shapes follow from x and n.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from . import _bnbq, ops_torch
from .ops_autograd import is_differentiated, is_watched
from .ops_library import FORMAT4, PACKED4, PACKED8, define, library, on_gpu

# ------------------------------------------------------------------ kernels


def linear4bit_experts(x, ends, qweight, absmax, absmax2, absmax_offset, bias, out_features, *settings):
    packed = qweight, absmax, absmax2, absmax_offset, bias
    if on_gpu(x):
        return one_by_one("linear4bit", x, ends, packed, out_features, out_features, *settings)
    return _bnbq.linear4bit_experts(x.resolve_neg(), ends.tolist(), *packed, out_features, *settings)


def linear4bit_experts_backward(gy, ends, qweight, absmax, absmax2, absmax_offset, in_features, *settings):
    packed = qweight, absmax, absmax2, absmax_offset
    if on_gpu(gy):
        return one_by_one("linear4bit_backward", gy, ends, packed, in_features, in_features, *settings)
    return _bnbq.linear4bit_experts_backward(gy.resolve_neg(), ends.tolist(), *packed, in_features, *settings)


def linear8bitlt_experts(x, ends, qweight, absmax, bias, *settings):
    packed = qweight, absmax, bias
    if on_gpu(x):
        return one_by_one("linear8bitlt", x, ends, packed, qweight.shape[1], *settings)
    return _bnbq.linear8bitlt_experts(x.resolve_neg(), ends.tolist(), *packed, None, *settings)


def linear8bitlt_experts_backward(gy, ends, qweight, absmax, blocksize):
    if on_gpu(gy):
        return one_by_one("linear8bitlt_backward", gy, ends, (qweight, absmax), qweight.shape[2], blocksize)
    return _bnbq.linear8bitlt_experts_backward(gy.resolve_neg(), ends.tolist(), qweight, absmax, None, blocksize)


def one_by_one(name: str, x, ends, packed, columns: int, *settings):
    """On a GPU, which has no kernel for all of them: the product with one weight, expert by expert. The host waits for
    ``ends``."""
    run, parts, start = getattr(torch.ops.bnbq, name), [], 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            parts.append(run(x[start:stop], *[t if t is None else t[expert] for t in packed], *settings))
        start = stop
    return torch.cat([*parts, x.new_zeros((x.shape[0] - start, columns))])


define(
    f"linear4bit_experts(Tensor x, Tensor ends, {PACKED4}, Tensor? bias, SymInt out_features, {FORMAT4}, "
    "str? compute_dtype, str? activations) -> Tensor",
    linear4bit_experts,
    lambda x, ends, qweight, absmax, absmax2, absmax_offset, bias, n, *_: x.new_empty((x.shape[0], n)),
)
define(
    f"linear4bit_experts_backward(Tensor gy, Tensor ends, {PACKED4}, SymInt in_features, {FORMAT4}, "
    "str? compute_dtype) -> Tensor",
    linear4bit_experts_backward,
    lambda gy, ends, qweight, absmax, absmax2, absmax_offset, k, *_: gy.new_empty((gy.shape[0], k)),
)
define(
    f"linear8bitlt_experts(Tensor x, Tensor ends, {PACKED8}, Tensor? bias, float threshold, int blocksize) -> Tensor",
    linear8bitlt_experts,
    lambda x, ends, qweight, *_: x.new_empty((x.shape[0], qweight.shape[1])),
)
define(
    f"linear8bitlt_experts_backward(Tensor gy, Tensor ends, {PACKED8}, int blocksize) -> Tensor",
    linear8bitlt_experts_backward,
    lambda gy, ends, qweight, *_: gy.new_empty((gy.shape[0], qweight.shape[2])),
)

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        linear4bit_experts,
        linear4bit_experts_backward,
        linear8bitlt_experts,
        linear8bitlt_experts_backward,
    )
}


# ------------------------------------------------------------------ gradients


def compute(name: str, *arguments):
    """Straight to the kernel, unless somebody watches."""
    run = getattr(torch.ops.bnbq, name) if is_watched(arguments[0]) else KERNELS[name]
    return run(*arguments)


def bias_gradient(ctx, gy: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
    """Sums over each expert's rows in float32."""
    if ctx.bias_shape is None:
        return None
    rows = torch.searchsorted(ends, torch.arange(gy.shape[0], device=gy.device), right=True)
    sums = gy.new_zeros((ctx.bias_shape[0] + 1, ctx.bias_shape[1]), dtype=torch.float32)
    return sums.index_add(0, rows, gy.float())[:-1].to(ctx.bias_dtype)


def remember_bias(ctx, bias, index: int) -> None:
    wanted = bias is not None and ctx.needs_input_grad[index]
    ctx.bias_shape, ctx.bias_dtype = (bias.shape, bias.dtype) if wanted else (None, None)


class Linear4bitExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        x, ends, qweight, absmax, absmax2, absmax_offset, bias, _, *settings, _ = inputs  # no activations
        ctx.save_for_backward(ends, qweight, absmax, absmax2, absmax_offset)
        ctx.settings = x.shape[-1], *settings
        remember_bias(ctx, bias, 6)
        return compute("linear4bit_experts", *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        gx, packed = None, ctx.saved_tensors  # once: a checkpoint recomputes them for whom asks
        if ctx.needs_input_grad[0]:
            gx = compute("linear4bit_experts_backward", gy, *packed, *ctx.settings)
        return gx, *[None] * 5, bias_gradient(ctx, gy, packed[0]), *[None] * 5


class Linear8bitLtExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _, ends, qweight, absmax, bias, _, ctx.blocksize = inputs
        ctx.save_for_backward(ends, qweight, absmax)
        remember_bias(ctx, bias, 4)
        return compute("linear8bitlt_experts", *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        gx, packed = None, ctx.saved_tensors  # once: a checkpoint recomputes them for whom asks
        if ctx.needs_input_grad[0]:
            gx = compute("linear8bitlt_experts_backward", gy, *packed, ctx.blocksize)
        return gx, *[None] * 3, bias_gradient(ctx, gy, packed[0]), None, None


DIFFERENTIABLE = {"linear4bit_experts": Linear4bitExperts, "linear8bitlt_experts": Linear8bitLtExperts}

# What torch.compile sees where a gradient is needed, as in ops_autograd.py.
for _name, _function in DIFFERENTIABLE.items():
    _schema = str(getattr(torch.ops.bnbq, _name).default._schema).removeprefix("bnbq::")
    library.define(_schema.replace(_name, f"{_name}_autograd", 1))
    library.impl(f"{_name}_autograd", _function.apply, "CompositeImplicitAutograd")


# ------------------------------------------------------------------ what the layers call


def multiply(name: str, x, bias, *arguments):
    if is_dynamo_compiling():
        return getattr(torch.ops.bnbq, f"{name}_autograd" if is_differentiated(x, bias) else name)(x, *arguments)
    return DIFFERENTIABLE[name].apply(x, *arguments) if is_differentiated(x, bias) else compute(name, x, *arguments)


def experts_linear4bit(x, ends, packed: dict, bias, out_features: int, *, quant_type, blocksize, compute_dtype,
                       activations):
    """y float[m, out_features] in x's dtype (see the head of this file). ``packed``: qweight, absmax and, with double
    quantisation, absmax2 and absmax_offset."""
    if compute_dtype is not None:
        compute_dtype = ops_torch.compute_name("linear4bit", compute_dtype)
    get = packed.get
    return multiply(
        "linear4bit_experts", ops_torch.autocast(x), bias, ends, get("qweight"), get("absmax"), get("absmax2"),
        get("absmax_offset"), bias, out_features, quant_type, blocksize, compute_dtype, activations,
    )


def experts_linear8bitlt(x, ends, packed: dict, bias, *, threshold, blocksize, compute_dtype):
    """The same for LLM.int8(): y float[m, n] in x's dtype."""
    x = ops_torch.autocast(x)
    if compute_dtype is not None and compute_dtype != x.dtype:
        x = x.to(compute_dtype).to(x.dtype)
    return multiply(
        "linear8bitlt_experts", x, bias, ends, packed["qweight"], packed["absmax"], bias, threshold, blocksize
    )
