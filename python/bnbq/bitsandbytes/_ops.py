"""``torch.ops.bnbq_bitsandbytes``: the 4-bit, 8-bit and int8 operators of bitsandbytes, by its schemas.

4-bit and row-wise int8 go to the C core through `bnbq.ops`. The blockwise 8-bit code, the int32 product and its
scaling have no kernels there: they are PyTorch operations here, exact ones. Imported once per process.

Errors are those of `bnbq.ops`: ValueError for a wrong shape or value, TypeError for a wrong dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checkpoint_bnb, ops, reference
from .quant_state import QuantState, dequantize_state, product_4bit

BNB_QUANT_TYPES = checkpoint_bnb.BNB_QUANT_TYPES
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY, INV127 = float(reference.TINY_4BIT), float(reference.INV127)

library = torch.library.Library("bnbq_bitsandbytes", "DEF")


def define(name: str, arguments: str, results: str, kernel, fake) -> None:
    library.define(f"{name}({arguments}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bnbq_bitsandbytes::{name}", fake, lib=library)


def define_with_out(name: str, arguments: str, kernel, fake) -> None:
    """The operator, and its overload that writes into a last argument ``out``."""

    def into(*inputs_and_out):
        *inputs, out = inputs_and_out
        result = kernel(*inputs)
        if (out.shape, out.dtype, out.device) != (result.shape, result.dtype, result.device):
            raise ValueError(f"{name}: out is {describe(out)}, wanted {describe(result)}")
        out.copy_(result)

    define(name, arguments, "Tensor", kernel, fake)
    define(f"{name}.out", f"{arguments}, Tensor! out", "()", into, lambda *_: None)


def describe(tensor: Tensor) -> str:
    return f"{checkpoint_bnb.describe(tensor)} on {tensor.device}"


def check_4bit(name: str, quant_type: str, dtype: torch.dtype) -> None:
    if quant_type not in BNB_QUANT_TYPES:
        raise ValueError(f"{name}: quant_type is {quant_type!r}, wanted one of {', '.join(BNB_QUANT_TYPES)}")
    if dtype not in FLOATS:
        raise ValueError(f"{name}: the dtype is {dtype}, wanted float32, bfloat16 or float16")


# ------------------------------------------------------------------ 4 bit


def quantize_4bit(A, blocksize, quant_type, quant_storage):
    check_4bit("quantize_4bit", quant_type, A.dtype)
    packed = ops.quantize_4bit(A, quant_type, blocksize)
    qweight = packed.qweight.reshape(-1)
    if qweight.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quantize_4bit: {qweight.numel()} packed bytes cannot be stored as {quant_storage}; use torch.uint8"
        )
    return qweight.view(quant_storage).unsqueeze(1), packed.absmax.reshape(-1)


def quantize_4bit_fake(A, blocksize, quant_type, quant_storage):
    check_4bit("quantize_4bit", quant_type, A.dtype)
    ops.check_blocksize("quantize_4bit", blocksize)
    count = (A.numel() + 1) // 2 // quant_storage.itemsize
    return A.new_empty(count, 1, dtype=quant_storage), A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    check_4bit("dequantize_4bit", quant_type, dtype)
    ops.check_blocksize("dequantize_4bit", blocksize)
    state = QuantState(absmax, torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=dtype)
    return dequantize_state(A, state)


def dequantize_4bit_fake(A, absmax, blocksize, quant_type, shape, dtype):
    check_4bit("dequantize_4bit", quant_type, dtype)
    return A.new_empty(shape, dtype=dtype)


def gemm_state(A, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset) -> QuantState:
    """With double quantisation ``absmax`` is the second level's."""
    check_4bit("gemm_4bit", quant_type, A.dtype)
    ops.check_blocksize("gemm_4bit", blocksize)
    if len(shapeB) != 2:
        raise ValueError(f"gemm_4bit: shapeB is {list(shapeB)}, wanted [n, k]")
    settings = dict(shape=torch.Size(shapeB), blocksize=blocksize, quant_type=quant_type, dtype=A.dtype)
    if absmax_8bit is None:
        return QuantState(absmax, **settings)
    if absmax_code is None or absmax_offset is None:
        raise ValueError("gemm_4bit: absmax_8bit is given without absmax_code and absmax_offset")
    state2 = QuantState(absmax, code=absmax_code, blocksize=reference.ABSMAX_BLOCK, dtype=torch.float32)
    return QuantState(absmax_8bit, offset=absmax_offset, state2=state2, **settings)


def gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None,
              absmax_offset=None):
    state = gemm_state(A, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset)
    return product_4bit(A, B, state, bias)


def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    state = gemm_state(A, shapeB, absmax, blocksize, quant_type_of(code), None, None, None)
    return product_4bit(A, B, state)


def gemv_4bit_fake(A, B, shapeB, absmax, code, blocksize):
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def quant_type_of(code: Tensor) -> str:
    for quant_type in BNB_QUANT_TYPES:
        if torch.equal(code.flatten().float(), checkpoint_bnb.codebook(quant_type).to(code.device)):
            return quant_type
    raise ValueError(f"gemv_4bit: code is {code.flatten().tolist()}, wanted the nf4 or the fp4 codebook")


define("quantize_4bit", "Tensor A, int blocksize, str quant_type, ScalarType quant_storage", "(Tensor, Tensor)",
       quantize_4bit, quantize_4bit_fake)
define_with_out("dequantize_4bit", "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
                "ScalarType dtype", dequantize_4bit, dequantize_4bit_fake)
define_with_out("gemv_4bit", "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize",
                gemv_4bit, gemv_4bit_fake)
# Composite: the tracer and autograd look inside, where bnbq's own operators have their gradients.
library.define("gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
               "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) "
               "-> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("gemm_4bit", gemm_4bit, "CompositeImplicitAutograd")


# ------------------------------------------------------------------ 8-bit codes in blocks


def quantize_blockwise(A, code, blocksize):
    """The nearest value of ``code`` for each element times the f32 reciprocal of its block's absmax; a tie takes the
    lower value. A NaN or an Inf is a ValueError.
    """
    check_code("quantize_blockwise", code, blocksize)
    if A.dtype not in FLOATS:
        raise ValueError(f"quantize_blockwise: A is {describe(A)}, wanted float32, bfloat16 or float16")
    flat = A.reshape(-1).float()
    whole = len(flat) // blocksize * blocksize
    absmax = flat[:whole].view(-1, blocksize).abs().amax(1)
    if whole < len(flat):
        absmax = torch.cat([absmax, flat[whole:].abs().amax(0, keepdim=True)])
    if not bool(torch.isfinite(absmax).all()):
        bad = int(torch.nonzero(~torch.isfinite(flat))[0])
        raise ValueError(f"quantize_blockwise: A has {flat[bad].item()} at flat index {bad}, wanted finite values")
    scaled = flat * absmax.clamp(min=TINY).reciprocal().repeat_interleave(blocksize)[: len(flat)]
    ascending, order = torch.sort(code.float(), stable=True)
    nearest = torch.bucketize(scaled, thresholds(ascending), out_int32=True)
    return order.to(torch.uint8)[nearest].view(A.shape), absmax


def thresholds(ascending: Tensor) -> Tensor:
    """For each two neighbours the greatest f32 that is not nearer to the upper one."""
    middle = (ascending[:-1].double() + ascending[1:].double()) / 2
    rounded = middle.float()
    below = torch.nextafter(rounded, rounded.new_tensor(-math.inf))
    return torch.where(rounded.double() > middle, below, rounded)


def quantize_blockwise_fake(A, code, blocksize):
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


def dequantize_blockwise(A, absmax, code, blocksize, dtype):
    """code[A] times the absmax of the block in f32, rounded once to dtype."""
    check_code("dequantize_blockwise", code, blocksize)
    if A.dtype != torch.uint8 or dtype not in FLOATS:
        raise ValueError(f"dequantize_blockwise: A is {describe(A)} and dtype {dtype}, wanted uint8 and a float dtype")
    if absmax.numel() != -(-A.numel() // blocksize):
        raise ValueError(
            f"dequantize_blockwise: absmax has {absmax.numel()} values, wanted {-(-A.numel() // blocksize)} for "
            f"{A.numel()} elements in blocks of {blocksize}"
        )
    scales = absmax.reshape(-1).float().repeat_interleave(blocksize)[: A.numel()]
    return code.float()[A.reshape(-1).int()].mul_(scales).to(dtype).view(A.shape)


def dequantize_blockwise_fake(A, absmax, code, blocksize, dtype):
    return A.new_empty(A.shape, dtype=dtype)


def check_code(name: str, code: Tensor, blocksize: int) -> None:
    if code.dim() != 1 or not 0 < code.numel() <= 256 or not code.is_floating_point():
        raise ValueError(f"{name}: code is {describe(code)}, wanted at most 256 floats in one dimension")
    if blocksize <= 0:
        raise ValueError(f"{name}: blocksize is {blocksize}, wanted a positive number")


define("quantize_blockwise", "Tensor A, Tensor code, int blocksize", "(Tensor, Tensor)",
       quantize_blockwise, quantize_blockwise_fake)
define_with_out("dequantize_blockwise", "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype",
                dequantize_blockwise, dequantize_blockwise_fake)


# ------------------------------------------------------------------ LLM.int8()


def int8_vectorwise_quant(A, threshold=0.0):
    """A[..., k] -> (i8 [..., k], absmax f32 [rows], columns with an element of at least threshold, or None for 0).

    Outliers count for no absmax and become 0, with more than one row their whole columns do.
    """
    flat, columns = A.reshape(-1, A.shape[-1]), None
    if threshold > 0:
        outliers = flat.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        flat = flat.masked_fill(outliers, 0)
    q, absmax = ops.quantize_8bit(flat)
    if columns is not None and len(flat) > 1:
        q[:, columns] = 0
    return q.view(A.shape), absmax, columns


def int8_vectorwise_quant_fake(A, threshold=0.0):
    columns = None if threshold <= 0 else A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)
    return A.new_empty(A.shape, dtype=torch.int8), A.new_empty(rows_of(A), dtype=torch.float32), columns


def int8_double_quant(A, threshold=0.0):
    """`int8_vectorwise_quant` by rows and, with the same outliers left out, by columns (i8 [..., k], f32 [k])."""
    by_row, row_absmax, columns = int8_vectorwise_quant(A, threshold)
    flat = A.reshape(-1, A.shape[-1])
    if threshold > 0:
        flat = flat.masked_fill(flat.abs() >= threshold, 0)
    by_column, column_absmax = ops.quantize_8bit(flat.t())
    return by_row, by_column.t().contiguous().view(A.shape), row_absmax, column_absmax, columns


def int8_double_quant_fake(A, threshold=0.0):
    by_row, row_absmax, columns = int8_vectorwise_quant_fake(A, threshold)
    return by_row, torch.empty_like(by_row), row_absmax, A.new_empty(A.shape[-1], dtype=torch.float32), columns


def rows_of(A: Tensor) -> int:
    return math.prod(A.shape[:-1])


def int8_vectorwise_dequant(A, stats):
    q = A.reshape(-1, A.shape[-1])
    return ops.dequantize_8bit(q, stats.reshape(-1).float()).view(A.shape)


def int8_vectorwise_dequant_fake(A, stats):
    return A.new_empty(A.shape, dtype=torch.float32)


def int8_linear_matmul(A, B):
    """A[..., k] . B[n, k]^T in int32, exact: float64 holds every sum, float32 only those of 1024 columns."""
    if A.dtype != torch.int8 or B.dtype != torch.int8:
        raise ValueError(f"int8_linear_matmul: A is {describe(A)} and B {describe(B)}, wanted int8")
    return (A.double() @ B.double().t()).to(torch.int32)


def int8_linear_matmul_fake(A, B):
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


def int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    """int32 sums -> float16 (or dtype): times both absmax over 127 squared, plus bias."""
    if A.dtype != torch.int32:
        raise ValueError(f"int8_mm_dequant: A is {describe(A)}, wanted int32")
    scales = (row_stats.reshape(-1, 1).float() * INV127) * (col_stats.reshape(1, -1).float() * INV127)
    out = A.reshape(-1, A.shape[-1]).float() * scales
    if bias is not None:
        out += bias
    return out.to(dtype or torch.float16).view(A.shape)


def int8_mm_dequant_fake(A, row_stats, col_stats, dtype=None, bias=None):
    return A.new_empty(A.shape, dtype=dtype or torch.float16)


def int8_scaled_mm(A, B, row_stats, col_stats, bias=None, dtype=None):
    return int8_mm_dequant(int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def int8_scaled_mm_fake(A, B, row_stats, col_stats, bias=None, dtype=None):
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


def int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    """The int8 product of CA and CB plus the float product of A's outlier columns; those columns too."""
    out = int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.float32)
    if outlier_cols is None:
        return out.to(A.dtype), A.new_empty(0)
    columns = A[..., outlier_cols]
    weight = int8_vectorwise_dequant(CB[:, outlier_cols], SCB)
    return (out + columns.float() @ weight.t()).to(A.dtype), columns


def int8_mixed_scaled_mm_fake(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    columns = A.new_empty(0) if outlier_cols is None else A.new_empty((*A.shape[:-1], outlier_cols.shape[0]))
    return A.new_empty((*CA.shape[:-1], CB.shape[0])), columns


define("int8_vectorwise_quant", "Tensor A, float threshold=0.0", "(Tensor, Tensor, Tensor?)",
       int8_vectorwise_quant, int8_vectorwise_quant_fake)
define("int8_double_quant", "Tensor A, float threshold=0.0", "(Tensor, Tensor, Tensor, Tensor, Tensor?)",
       int8_double_quant, int8_double_quant_fake)
define("int8_vectorwise_dequant", "Tensor A, Tensor stats", "Tensor",
       int8_vectorwise_dequant, int8_vectorwise_dequant_fake)
define_with_out("int8_linear_matmul", "Tensor A, Tensor B", int8_linear_matmul, int8_linear_matmul_fake)
define("int8_mm_dequant", "Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None",
       "Tensor", int8_mm_dequant, int8_mm_dequant_fake)
define("int8_scaled_mm", "Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
       "ScalarType? dtype=None", "Tensor", int8_scaled_mm, int8_scaled_mm_fake)
define("int8_mixed_scaled_mm", "Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
       "Tensor? bias=None", "(Tensor, Tensor?)", int8_mixed_scaled_mm, int8_mixed_scaled_mm_fake)
