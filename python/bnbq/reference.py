"""The specification of bnbq, in plain NumPy.

Every byte that bnbq writes and every product that it computes is defined here; the C and CUDA
sources are accelerations of this file and the tests compare them with it: packed bytes, scales
and int8 products bit for bit, floating-point sums within a bound derived from k.

Shapes: ``x[m, k]``, ``w[n, k]``, ``y[m, n]``. All float arithmetic is IEEE fp32 with one rounding
per written operation (no fused multiply-add) unless a comment says otherwise.

4-bit formats index a codebook of 16 values, scaled by the absmax of a block. Blocks run over the
flattened row-major weight. Two codes share a byte, the earlier element in the high nibble::

    element   0 1   2 3   4 5
    byte     [a b] [c d] [e f]      a = codes[0] << 4 | codes[1]

nf4 is the NormalFloat of QLoRA (Dettmers et al. 2023, section 3 and appendix E); fp4 is
bitsandbytes' 1-2-1 float; int4 is uniform and symmetric. int8 is the row-wise absmax quantisation
of LLM.int8() (Dettmers et al. 2022, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ACTIVATION_BLOCK = 64
"""Columns of a block of int8 activations of a 4-bit layer, at most."""
ABSMAX_BLOCK = 256
"""Block of the second level of double quantisation, in first-level scales."""

TINY_4BIT = np.float32(1e-38)
"""Least divisor of a 4-bit block: keeps the reciprocal finite, as bitsandbytes does."""
TINY_8BIT = np.float32(1e-36)
"""Least divisor of an int8 row: 127 * (1 / 1e-36) is finite."""
INV127 = np.float32(1 / 127)


def linspace_f32(start: float, end: float, count: int) -> np.ndarray:
    """An fp32 linspace whose upper half counts back from the end, as ``torch.linspace`` does.

    Each value is rounded once (torch's vector code uses a fused multiply-add). ``np.linspace``
    rounds differently, which would move published codebooks by a few ulp.
    """
    start, end = np.float32(start), np.float32(end)
    step = np.float64(np.float32((end - start) / np.float32(count - 1)))
    i = np.arange(count)
    return np.where(i < count // 2, start + step * i, end - step * (count - 1 - i)).astype(np.float32)


def nf4_codebook() -> np.ndarray:
    """Quantiles of the normal distribution: 8 positive, 7 negative and an exact zero."""
    offset = 0.9677083
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(linspace_f32(offset, 0.5, 9)[:-1].astype(np.float64))
    negative = -quantile(linspace_f32(offset, 0.5, 8)[:-1].astype(np.float64))
    values = np.sort(np.concatenate([positive, [0.0], negative]).astype(np.float32))
    return (values / values.max()).astype(np.float32)


def fp4_codebook() -> np.ndarray:
    """Sign bit and three magnitude bits; code 8 (minus zero) decodes to +0."""
    magnitude = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)
    values = np.concatenate([magnitude, -magnitude])
    values[8] = 0.0
    return values


def int4_codebook() -> np.ndarray:
    """Offset binary: code c is (c - 8) / 7. Encoding never writes code 0."""
    return ((np.arange(16, dtype=np.float32) - np.float32(8)) / np.float32(7)).astype(np.float32)


@dataclass(frozen=True)
class Format:
    """A 4-bit format: 16 values and what follows from them.

    An input is encoded by counting the thresholds below it (a tie goes to the lower value) and
    looking the count up in ``order``, the codes in ascending order of their values.
    """

    name: str
    codebook: np.ndarray
    order: np.ndarray = field(init=False)
    thresholds: np.ndarray = field(init=False)

    def __post_init__(self):
        order = np.argsort(self.codebook, kind="stable").astype(np.uint8)
        ascending = self.codebook[order]
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "thresholds", ((ascending[:-1] + ascending[1:]) / np.float32(2)).astype(np.float32))


FORMATS = {f.name: f for f in (
    Format("nf4", nf4_codebook()),
    Format("fp4", fp4_codebook()),
    Format("int4", int4_codebook()),
)}


def dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic type (Dettmers 2015, arXiv:1511.04561) as bitsandbytes builds it.

    Decade i of 7 (1e-6 .. 1) holds the 2**i midpoints of an even grid on [0.1, 1], both signs;
    0 and 1 complete the 256 values, which are ascending: [127] is 0, [255] is 1.
    """
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = linspace_f32(0.1, 1, 2**i + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = dynamic_map()


def find_format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"unknown 4-bit format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def check_finite(w: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(w))
    if bad.size:
        index = tuple(int(i) for i in np.unravel_index(bad[0], w.shape))
        raise ValueError(f"weight has {w[index]} at index {index}")


# ------------------------------------------------------------------ 4 bit

def quantize_4bit(w: np.ndarray, quant_type: str = "nf4", blocksize: int = 64):
    """w of any shape -> (packed codes u8[ceil(size / 2)], absmax f32[ceil(size / blocksize)]).

    A whole block is multiplied by the fp32 reciprocal of its absmax. The short block at the end
    (if any) is divided instead and its stored absmax is at least 1e-38: both are what
    bitsandbytes' CPU code does, and the bytes are equal to its bytes.
    """
    fmt = find_format(quant_type)
    w = np.asarray(w, np.float32)
    check_finite(w)
    flat = w.ravel()
    whole = flat.size // blocksize * blocksize
    blocks = flat[:whole].reshape(-1, blocksize)
    absmax = np.abs(blocks).max(1, initial=0).astype(np.float32)
    inverse = np.float32(1) / np.maximum(absmax, TINY_4BIT)
    scaled = np.clip(blocks * inverse[:, None], -1, 1).ravel()
    if whole < flat.size:
        tail_absmax = np.maximum(np.abs(flat[whole:]).max(), TINY_4BIT)
        absmax = np.append(absmax, tail_absmax)
        scaled = np.append(scaled, np.clip(flat[whole:] / tail_absmax, -1, 1))
    if scaled.size % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = fmt.order[np.searchsorted(fmt.thresholds, scaled, side="left")]
    return codes[::2] << 4 | codes[1::2], absmax.astype(np.float32)


def dequantize_4bit(qweight, absmax, shape, quant_type: str = "nf4", blocksize: int = 64) -> np.ndarray:
    """Codes and fp32 scales -> f32[shape]; one multiplication per element."""
    size = int(np.prod(shape))
    codes = np.stack([qweight.ravel() >> 4, qweight.ravel() & 15], 1).ravel()[:size]
    return (find_format(quant_type).codebook[codes] * np.repeat(absmax.ravel(), blocksize)[:size]).reshape(shape)


def sum_in_order(values: np.ndarray) -> np.float64:
    """The float64 sum of 256 neighbours, each from the first to the last, then of 256 of those sums, and so on.

    An order that thousands of threads can keep to, so that the sum does not depend on how many there are.
    """
    sums = values.astype(np.float64)
    while sums.size > 1:
        rows = np.pad(sums, (0, -sums.size % ABSMAX_BLOCK)).reshape(-1, ABSMAX_BLOCK)
        sums = np.add.accumulate(rows, 1)[:, -1]
    return sums[0]


def quantize_absmax(absmax: np.ndarray):
    """Double quantisation of scales (QLoRA section 3): f32[count] -> (codes u8, absmax2 f32, offset f32[1]).

    The offset is the mean, its sum taken by :func:`sum_in_order`. Blocks of 256; each code is the
    nearest value of the dynamic map, ties to the lower one.
    """
    flat = np.asarray(absmax, np.float32).ravel()
    offset = np.float32(sum_in_order(flat) / flat.size if flat.size else 0)
    centred = flat - offset
    starts = np.arange(0, flat.size, ABSMAX_BLOCK)
    absmax2 = np.maximum.reduceat(np.abs(centred), starts) if flat.size else np.empty(0, np.float32)
    inverse = np.float32(1) / np.maximum(absmax2, TINY_4BIT)
    scaled = np.clip(centred * np.repeat(inverse, ABSMAX_BLOCK)[: flat.size], -1, 1)
    thresholds = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    codes = np.searchsorted(thresholds, scaled, side="left").astype(np.uint8)
    return codes, absmax2.astype(np.float32), np.array([offset], np.float32)


def dequantize_absmax(codes, absmax2, offset) -> np.ndarray:
    """Codes -> f32, a multiplication and then an addition."""
    return DYNAMIC_MAP[codes.ravel()] * np.repeat(absmax2, ABSMAX_BLOCK)[: codes.size] + np.float32(offset[0])


def linear_4bit(x, qweight, absmax, n: int, bias=None, quant_type: str = "nf4", blocksize: int = 64) -> np.ndarray:
    """x[m, k] . dequantised W[n, k]^T + bias, the sum in float64: what implementations approximate."""
    w = dequantize_4bit(qweight, absmax, (n, x.shape[-1]), quant_type, blocksize)
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return y if bias is None else y + bias.astype(np.float64)


def codebook_int8(quant_type: str):
    """The codebook in int8 at the largest scale that fits, and the step: i8[16], f32 value of one.

    127 for nf4 and fp4; 112 for int4, whose code 0 is -8/7, so that it is exact.
    """
    codebook = find_format(quant_type).codebook
    scale = min(np.float32(127) / codebook.max(), np.float32(128) / -codebook.min())
    return np.rint(codebook * scale).astype(np.int8), np.float32(1) / scale


def linear_4bit_int8(x, qweight, absmax, n: int, bias=None, quant_type: str = "nf4", blocksize: int = 64) -> np.ndarray:
    """``activations="int8"``: both operands rounded to int8, y f32[m, n] defined bit by bit.

    Blocks of x have min(blocksize, 64) columns and the scale of their own absmax; k % blocksize must be 0. Sums over
    a block are exact. A NaN or an Inf in x makes its row of y NaN: the steps of its block are NaN.
    """
    x = np.asarray(x, np.float32)
    m, k = x.shape
    width = min(blocksize, ACTIVATION_BLOCK)
    finite = np.isfinite(x)
    q, x_absmax = quantize_rows(x.reshape(-1, width), ~finite.reshape(-1, width))
    q = q.reshape(m, k).astype(np.int64)
    steps = np.where(finite.reshape(-1, width).all(1), x_absmax * INV127, np.float32(np.nan)).reshape(m, -1)
    codes = np.stack([qweight.ravel() >> 4, qweight.ravel() & 15], 1).reshape(n, k)
    codebook, step = codebook_int8(quant_type)
    w = codebook[codes].astype(np.int64)
    scales = absmax.reshape(n, -1) * step
    y = np.zeros((m, n), np.float32)
    for i, s in enumerate(column_blocks(k, width)):
        product = (q[:, s] @ w[:, s].T).astype(np.float32)
        y += product * (steps[:, i, None] * scales[:, s.start // blocksize])
    return y if bias is None else y + np.asarray(bias, np.float32)


# ------------------------------------------------------------------ 8 bit

def quantize_rows(x: np.ndarray, outlier: np.ndarray | None = None):
    """Row-wise absmax int8: x[r, c] -> (q i8[r, c], absmax f32[r]); ties round to even.

    Outlier elements are left out of the absmax and become 0.
    """
    x = np.asarray(x, np.float32)
    x = np.where(outlier, np.float32(0), x) if outlier is not None else x
    absmax = np.abs(x).max(1, initial=0).astype(np.float32)
    # Not 127 / absmax, an ulp away at times: bitsandbytes' CPU code multiplies by the reciprocal.
    scale = np.float32(127) * (np.float32(1) / np.maximum(absmax, TINY_8BIT))
    return np.rint(x * scale[:, None]).astype(np.int8), absmax


def column_blocks(k: int, blocksize: int):
    """Slices of the k columns that share a scale; blocksize 0 is one slice."""
    step = blocksize or max(k, 1)
    return [slice(start, min(start + step, k)) for start in range(0, k, step)]


def quantize_8bit(w: np.ndarray, blocksize: int = 0):
    """w[n, k] -> (i8[n, k], absmax f32[n]), or f32[n, ceil(k / blocksize)] with blocks along k.

    Blocks restart at every row (this format is bnbq's own). Row-wise bytes equal bitsandbytes'
    where the weight is exactly representable in fp16, to which bitsandbytes rounds it first.
    """
    w = np.asarray(w, np.float32)
    check_finite(w)
    parts = [quantize_rows(w[:, s]) for s in column_blocks(w.shape[1], blocksize)]
    q = np.concatenate([p[0] for p in parts], 1)
    return q, np.stack([p[1] for p in parts], 1) if blocksize else parts[0][1]


def dequantize_8bit(q, absmax, blocksize: int = 0) -> np.ndarray:
    """(q * absmax) * (1 / 127), rounded twice, as bitsandbytes' int8_vectorwise_dequant."""
    scales = np.repeat(absmax, blocksize, 1)[:, : q.shape[1]] if blocksize else absmax[:, None]
    return (q.astype(np.float32) * scales) * INV127


def outliers_per_row(x: np.ndarray, threshold: float) -> np.ndarray:
    """bool[m, k]: the elements that stay float, looked for in each row alone. Non-finite ones always do.

    The rule when batch invariance is asked for: a row's result does not depend on its neighbours.
    """
    return ~np.isfinite(x) | (np.abs(x) >= threshold if threshold > 0 else False)


def outliers_per_column(x: np.ndarray, threshold: float) -> np.ndarray:
    """The rule of the paper, and the default: a column with one outlier stays float in every row of the batch.

    On a real model it is measurably better than the rule per row: a column that is large in one
    row is large in others too, and leaving it out makes their scales finer.
    """
    mask = outliers_per_row(x, threshold)
    return np.broadcast_to(mask.any(0), x.shape) if threshold > 0 else mask


def linear_8bit(x, q, absmax, bias=None, threshold: float = 6.0, blocksize: int = 0,
                outliers=outliers_per_column) -> np.ndarray:
    """LLM.int8(): an exact int8 product for most of x, a float product for its outliers.

    x[m, k] float, q i8[n, k]; returns f32[m, n]. Rows are quantised by the absmax of what is not an
    outlier. The outliers' sum is taken in float64 here.
    """
    x = np.asarray(x, np.float32)
    mask = outliers(x, threshold)
    xq, x_absmax = quantize_rows(x, mask)
    scales = absmax if blocksize else absmax[:, None]
    y = np.zeros((x.shape[0], q.shape[0]), np.float32)
    for i, s in enumerate(column_blocks(x.shape[1], blocksize)):
        product = (xq[:, s].astype(np.int64) @ q[:, s].astype(np.int64).T).astype(np.float32)
        y += product * ((x_absmax * INV127)[:, None] * (scales[:, i] * INV127))
    with np.errstate(invalid="ignore"):
        w = dequantize_8bit(q, absmax, blocksize).astype(np.float64)
        for i in np.flatnonzero(mask.any(1)):
            columns = np.flatnonzero(mask[i])
            y[i] += (x[i, columns].astype(np.float64) @ w[:, columns].T).astype(np.float32)
    return y if bias is None else y + np.asarray(bias, np.float32)
