"""bitsandbytes.functional: quantise and dequantise tensors, in 4 bits, in 8-bit blocks and row by row in int8.

Arguments, defaults and shapes are bitsandbytes 0.50.2's. ``out`` and ``absmax`` arguments are filled if given.
Errors are ValueError and TypeError, naming the argument; so is a NaN or an Inf in what is to be quantised.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint_bnb, ops, reference
from ..ops import Packed4
from ._missing import OPTIMIZERS, reason_for
from .quant_state import DYNAMIC_MAP, QuantState, decoded_absmax, dequantize_state, product_4bit, state_from_core

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

_bnb = torch.ops.bnbq_bitsandbytes

# ------------------------------------------------------------------ codes


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic type (Dettmers 2015, arXiv:1511.04561): f32 [256], ascending, padded with zeros below 8 bits.

    Each decade below 1 holds the midpoints of an even grid on [0.1, 1], twice as many as the one before; 0 and 1 are
    codes too. The bits are a sign, at most max_exponent_bits of exponent and the rest; unsigned needs
    max_exponent_bits == total_bits - 1.
    """
    if not (1 <= max_exponent_bits <= total_bits <= 8 and (signed or max_exponent_bits == total_bits - 1)):
        raise ValueError(
            f"create_dynamic_map: max_exponent_bits is {max_exponent_bits}, wanted "
            f"{f'1 to {total_bits}' if signed else total_bits - 1} with total_bits={total_bits} (at most 8)"
        )
    free_bits = total_bits - 1 - max_exponent_bits
    grids = [(i + 1 - max_exponent_bits, int(2 ** (i + free_bits + (not signed)))) for i in range(max_exponent_bits)]
    if free_bits > 0:
        grids.append((0, 2**free_bits - 1))  # codes that use neither exponent nor indicator bit
    values = [0.0, 1.0]
    for exponent, count in grids:
        if count:
            edges = reference.linspace_f32(0.1, 1, count + 1)
            middles = np.float32(10.0**exponent) * ((edges[:-1] + edges[1:]) / np.float32(2))
            values += [*middles, *-middles] if signed else [*middles]
    values += [0.0] * (256 - len(values))
    return torch.from_numpy(np.sort(np.array(values, np.float32)))


def get_4bit_type(typename: str, device=None, blocksize: int = 64) -> Tensor:
    """The codebook of "nf4" or "fp4", f32 [16] (on the CPU unless ``device`` says otherwise)."""
    if typename not in checkpoint_bnb.BNB_QUANT_TYPES:
        raise NotImplementedError(
            f"get_4bit_type: got {typename!r}, bnbq.bitsandbytes knows {', '.join(checkpoint_bnb.BNB_QUANT_TYPES)}"
        )
    return checkpoint_bnb.codebook(typename).to(device or "cpu")


# ------------------------------------------------------------------ 4 bit


def quantize_4bit(A: Tensor, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type="fp4",
                  quant_storage=torch.uint8) -> tuple[Tensor, QuantState]:
    """Pack a float tensor of any shape.

    Args:
        blocksize: 64 unless given; 32, 64 ... 4096.
        compress_statistics: quantise the scales too, in blocks of 256.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype under which the packed bytes are handed out, [bytes / itemsize, 1].

    Returns the packed tensor and the QuantState that `dequantize_4bit` needs.
    """
    blocksize = 64 if blocksize is None else blocksize
    packed, scales = _bnb.quantize_4bit(A, blocksize, quant_type, quant_storage)
    weight = Packed4(None, *(ops.quantize_absmax(scales) if compress_statistics else (scales,)))
    state = state_from_core(weight, quant_type, blocksize, A.shape, A.dtype)
    return filled(packed, state, out, absmax)


def filled(quantized: Tensor, state: QuantState, out, absmax) -> tuple[Tensor, QuantState]:
    """The results, in the tensors that the caller brought along."""
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return quantized if out is None else out.copy_(quantized), state


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(A: Tensor, quant_state: QuantState | None = None, absmax=None, out=None, blocksize=None,
                    quant_type="fp4") -> Tensor:
    """What a packed tensor stands for, ``quant_state.shape`` in ``quant_state.dtype``.

    Without a quant_state ``absmax`` and ``out`` must be given, and ``out`` tells shape and dtype. A packed tensor of
    shape [1, bytes], a weight handed over transposed, gives the transposed result.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: wanted a quant_state, or absmax and out")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    dense = dequantize_state(A, quant_state)
    if out is not None:
        dense = out.copy_(dense)
    return dense.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 else dense


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None) -> Tensor:
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None) -> Tensor:
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(A: Tensor, B: Tensor, out=None, transposed_A=False, transposed_B=False, state=None) -> Tensor:
    """A[..., k] . W[n, k]^T for any number of rows; W is the packed B, also as ``B.t()``.

    The transposed_ arguments have no meaning, here as there.
    """
    if state is None:
        raise ValueError("gemv_4bit: wanted the state that quantize_4bit returned, got None")
    result = product_4bit(A, B, state)
    return result if out is None else out.copy_(result)


# ------------------------------------------------------------------ 8-bit codes in blocks


def quantize_blockwise(A: Tensor, code=None, absmax=None, out=None, blocksize=4096, nested=False):
    """Codes u8 [A.shape] of the nearest value of ``code`` (the signed dynamic map) in units of each block's absmax.

    A tie takes the lower value. nested quantises the scales in the same way. Returns the codes and the QuantState.
    """
    code = (DYNAMIC_MAP if code is None else code).to(A.device, copy=True)
    codes, scales = _bnb.quantize_blockwise(A, code, blocksize)
    state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        offset = ops.quantize_absmax(scales)[2].reshape(())  # their mean, summed in a fixed order
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
        state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return filled(codes, state, out, absmax)


def dequantize_blockwise(A: Tensor, quant_state=None, absmax=None, code=None, out=None, blocksize: int = 4096,
                         nested=False) -> Tensor:
    """The inverse of `quantize_blockwise`, in ``quant_state.dtype``; or f32 from absmax, code and blocksize."""
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: wanted a quant_state or absmax")
        code = DYNAMIC_MAP.to(A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    scales = decoded_absmax(quant_state) if quant_state.nested else quant_state.absmax
    arguments = A, scales, quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype
    if out is None:
        return _bnb.dequantize_blockwise(*arguments)
    _bnb.dequantize_blockwise.out(*arguments, out)
    return out


# ------------------------------------------------------------------ LLM.int8()


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0):
    """A float [..., k] -> (i8 [..., k], absmax f32 [rows], outlier columns or None).

    threshold > 0 leaves elements of at least that magnitude out, and zeroes their columns when there is more than one
    row; the indices of those columns come third.
    """
    return _bnb.int8_vectorwise_quant(A, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """i8 [..., k] and absmax [rows] -> f32 [..., k]."""
    return _bnb.int8_vectorwise_dequant(A, stats)


def int8_linear_matmul(A: Tensor, B: Tensor, out=None, dtype=torch.int32) -> Tensor:
    """i8 A[..., k] . B[n, k]^T -> int32 [..., n], exact for every k below 2^17."""
    if out is None:
        return _bnb.int8_linear_matmul(A, B)
    _bnb.int8_linear_matmul.out(A, B, out)
    return out


def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, out=None, bias=None) -> Tensor:
    """int32 sums of `int8_linear_matmul` -> fp16, scaled by the absmax of both operands; bias added."""
    result = _bnb.int8_mm_dequant(A, row_stats, col_stats, torch.float16, bias)
    return result if out is None else out.copy_(result)


def int8_double_quant(A: Tensor, col_stats=None, row_stats=None, out_col=None, out_row=None, threshold=0.0):
    """Row-wise and column-wise: (i8 by rows, i8 by columns, absmax of rows, of columns, outlier columns or None)."""
    for name, value in dict(col_stats=col_stats, row_stats=row_stats, out_col=out_col, out_row=out_row).items():
        if value is not None:
            raise ValueError(f"int8_double_quant: {name} cannot be given, the results are new tensors")
    return _bnb.int8_double_quant(A, threshold)


# ------------------------------------------------------------------ the rest


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's data, for C libraries of your own."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


__getattr__ = reason_for(
    __name__,
    {
        OPTIMIZERS: "optimizer_update_32bit optimizer_update_8bit_blockwise get_paged prefetch_tensor elementwise_func "
        "fill GlobalPageManager",
        "bnbq's C core is not called by addresses. dequantize_4bit (which fills out=), dequantize_blockwise, gemv_4bit "
        "and bnbq.bitsandbytes.matmul_4bit do what lib's functions are called for": "lib",
        "bitsandbytes has deprecated it; int8_linear_matmul multiplies int8 matrices": "igemm batched_igemm "
        "check_matmul",
        "only the maps that models are stored with are here: create_dynamic_map and get_4bit_type. quantize_blockwise "
        "takes any code of at most 256 values": "create_linear_map create_fp8_map create_normal_map",
    },
)
