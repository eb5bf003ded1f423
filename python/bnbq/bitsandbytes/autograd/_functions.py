"""matmul and matmul_4bit: the products of bitsandbytes, by the C core, with gradients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from .._missing import reason_for
from ..quant_state import QuantState, core_weight, product_4bit


@dataclass
class MatmulLtState:
    """What a product of int8 needs beside its operands.

    CB i8 [n, k] and SCB f32 [n] are the quantised weight; threshold, has_fp16_weights and is_training are settings.
    The other fields are there for code that reads or sets them.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: object = None
    idx: Tensor | None = None
    threshold: float = 0.0
    is_training: bool = True
    has_fp16_weights: bool = True
    has_accumulated_gradients: bool = False
    use_pool: bool = False
    CxB = CxBt = formatB = _tile_indices = None  # of layouts that are gone; old code asks whether they are None

    def reset_grads(self) -> None:
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


class Int8OfFloat(torch.autograd.Function):
    """A[..., k] . W[n, k]^T + bias for a float weight that is quantised for this one product.

    Gradients: of A through the quantised weight, of W as of a float layer (straight through), of bias.
    """

    @staticmethod
    def forward(ctx, A, weight, CB, SCB, bias, threshold):
        ctx.save_for_backward(A, CB, SCB)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return ops.linear8bitlt(A, CB, SCB, bias, threshold=threshold)

    @staticmethod
    def backward(ctx, grad):
        A, CB, SCB = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad_A = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_A = ops.linear8bitlt_backward(grad, CB, SCB)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ A.reshape(-1, A.shape[-1]).to(rows.dtype)).to(weight_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_A, grad_weight, None, None, grad_bias, None


def matmul(A: Tensor, B: Tensor, out=None, state: MatmulLtState | None = None, threshold=0.0, bias=None) -> Tensor:
    """LLM.int8(): A[..., k] . B[n, k]^T + bias[n] in A's dtype.

    With ``state.has_fp16_weights`` B is a float weight, quantised afresh in every call and trainable; ``state.CB`` and
    ``SCB`` then show what it became. Otherwise those two are the weight, quantised from B by the first call if they
    are None. ``state.threshold`` is that of outliers; a ``threshold`` above 0 sets it.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0:
        state.threshold = threshold
    if state.has_fp16_weights or state.CB is None or state.SCB is None:
        state.CB, state.SCB = ops.quantize_8bit(B.detach())
    if state.has_fp16_weights:
        result = Int8OfFloat.apply(A, B, state.CB, state.SCB, bias, state.threshold)
    else:
        result = ops.linear8bitlt(A, state.CB, state.SCB, bias, threshold=state.threshold)
    return into(out, result.to(A.dtype))


def matmul_4bit(A: Tensor, B: Tensor, quant_state: QuantState, out=None, bias=None) -> Tensor:
    """A[..., k] . W[n, k]^T + bias[n] in A's dtype, W being the packed B (also ``B.t()``).

    A weight that was packed as [k, n] is multiplied as such, with a DeprecationWarning.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: wanted the quant_state that quantize_4bit returned, got None")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: quant_state.shape is {list(quant_state.shape)}, wanted [n, k]")
    rows, columns = quant_state.shape
    if A.shape[-1] == columns or A.shape[-1] != rows:
        return into(out, product_4bit(A, B, quant_state, bias))
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"matmul_4bit: the weight was quantised as [k, n] ({rows}, {columns}); quantise it as [n, k]",
            DeprecationWarning,
            stacklevel=2,
        )
    weight = core_weight(B, quant_state)
    result = ops.linear4bit_backward(
        A,
        weight.qweight,
        weight.absmax,
        columns,
        absmax2=weight.absmax2,
        absmax_offset=weight.absmax_offset,
        quant_type=quant_state.quant_type,
        blocksize=quant_state.blocksize,
    )
    return into(out, (result if bias is None else result + bias).to(A.dtype))


def into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


__getattr__ = reason_for(
    __name__,
    {"call matmul_4bit or matmul, which have gradients": "MatMul4Bit MatMul8bitFp MatMul8bitLt GlobalOutlierPooler"},
)
