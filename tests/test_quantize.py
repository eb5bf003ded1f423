"""Quantise and dequantise: every byte equals the specification on every instruction set."""

import functools
import operator

import numpy as np
import pytest
import torch

from bnbq import _bnbq, ops
from bnbq import reference as ref
from cases import BLOCKSIZES, FORMATS, awkward_blocks, weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_packed_equal(w32: np.ndarray, packed, name: str, blocksize: int):
    q, absmax = ref.quantize_4bit(w32, name, blocksize)
    assert np.array_equal(np.asarray(packed.qweight).ravel(), q)
    assert np.array_equal(np.asarray(packed.absmax).ravel().view(np.uint32), absmax.view(np.uint32))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_4bit_bytes_of_awkward_blocks(name, blocksize, isa):
    w = awkward_blocks(blocksize, ref.FORMATS[name].thresholds)
    packed = ops.quantize_4bit(w, name, blocksize)
    assert_packed_equal(w, packed, name, blocksize)
    dense = ops.dequantize_4bit(packed.qweight, packed.absmax, w.shape, quant_type=name, blocksize=blocksize)
    want = ref.dequantize_4bit(packed.qweight, packed.absmax, w.shape, name, blocksize)
    assert np.array_equal(dense.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("count", [1, 2, 31, 63, 64, 65, 127, 1000, 4096 * 5 + 77, 300_001])
@pytest.mark.parametrize("name", FORMATS)
def test_4bit_bytes_of_any_count(name, count, isa, threads):
    w = weight(1, count)[0]
    packed = ops.quantize_4bit(w, name)
    assert_packed_equal(w, packed, name, 64)
    for start in (0, count // 3):  # a dense slice is not addressable, the whole is
        dense = ops.dequantize_4bit(packed.qweight, packed.absmax, (count,), quant_type=name)[start:]
        assert np.array_equal(dense, ref.dequantize_4bit(packed.qweight, packed.absmax, (count,), name)[start:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_bytes_follow_the_value_not_the_dtype_or_the_strides(dtype, isa):
    dense = torch.from_numpy(weight(48, 192)).to(dtype)
    want = dense.float().numpy()
    transposed = dense.t().contiguous().t()
    wide = torch.zeros(48, 400, dtype=dtype)
    wide[:, 5:197] = dense
    backwards = torch.from_numpy(np.ascontiguousarray(want[::-1])).to(dtype)
    for view in (dense, transposed, wide[:, 5:197], backwards.flip(0)):
        packed = ops.quantize_4bit(view)
        assert_packed_equal(want, packed, "nf4", 64)
        assert packed.qweight.shape == (48, 96) and packed.absmax.shape == (48, 3)
    negative = ops.quantize_4bit(np.ascontiguousarray(want[::-1])[::-1])
    assert_packed_equal(want, negative, "nf4", 64)


def test_blocks_that_cross_rows_are_stored_flat(isa):
    w = weight(5, 100)
    packed = ops.quantize_4bit(w)
    assert packed.qweight.shape == (250,) and packed.absmax.shape == (8,)
    assert_packed_equal(w, packed, "nf4", 64)


@pytest.mark.parametrize("out", DTYPES)
def test_dequantised_values_round_once_to_the_output_dtype(out, isa):
    packed = ops.quantize_4bit(torch.from_numpy(weight(16, 256)))
    got = ops.dequantize_4bit(packed.qweight, packed.absmax, (16, 256), dtype=out)
    want = ref.dequantize_4bit(packed.qweight.numpy(), packed.absmax.numpy(), (16, 256))
    assert got.dtype == out and torch.equal(got, torch.from_numpy(want).to(out))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 5000, 65536, 65537, 300_000])
def test_double_quantisation_bytes(count, isa, threads):
    absmax = np.abs(weight(1, count)[0]) + np.float32(0.01)
    absmax[0] = 0
    for got, want in zip(ops.quantize_absmax(absmax), ref.quantize_absmax(absmax), strict=True):
        assert np.array_equal(got, want)
    parts = ref.quantize_absmax(absmax)
    assert np.array_equal(ops.dequantize_absmax(*parts), ref.dequantize_absmax(*parts))


def test_the_offset_is_a_sum_of_sums():
    """Values of one sign and very different size, whose float64 sum depends on its order."""
    absmax = np.exp2(np.random.default_rng(3).uniform(-40, 40, 300_000)).astype(np.float32)
    sums = [float(x) for x in absmax]
    while len(sums) > 1:
        groups = [sums[i:i + 256] for i in range(0, len(sums), 256)]
        sums = [functools.reduce(operator.add, group) for group in groups]
    assert sums[0] == ref.sum_in_order(absmax) != functools.reduce(operator.add, map(float, absmax))
    assert ops.quantize_absmax(absmax)[2][0] == np.float32(sums[0] / absmax.size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scales_are_refused(bad):
    absmax = np.ones(300, np.float32)
    absmax[270] = bad
    with pytest.raises(ValueError, match="absmax has a NaN or an Inf"):
        ops.quantize_absmax(absmax)


@pytest.mark.parametrize("blocksize", (0, 32, 64, 4096))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (17, 100), (4, 4096), (300, 33)])
def test_int8_bytes(shape, blocksize, isa, threads):
    w = weight(*shape)
    w[0] = 0
    w[-1, -1] = -1e-38
    q, absmax = ops.quantize_8bit(w, blocksize)
    want_q, want_absmax = ref.quantize_8bit(w, blocksize)
    assert np.array_equal(q, want_q) and np.array_equal(absmax, want_absmax)
    dense = ops.dequantize_8bit(q, absmax, blocksize=blocksize)
    assert np.array_equal(dense.view(np.uint32), ref.dequantize_8bit(q, absmax, blocksize).view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_bytes_follow_the_value_not_the_dtype_or_the_strides(dtype, isa):
    dense = torch.from_numpy(weight(33, 130)).to(dtype)
    want = ref.quantize_8bit(dense.float().numpy())
    for view in (dense, dense.t().contiguous().t()):
        q, absmax = ops.quantize_8bit(view)
        assert np.array_equal(q.numpy(), want[0]) and np.array_equal(absmax.numpy(), want[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantize", [ops.quantize_4bit, ops.quantize_8bit])
def test_non_finite_weights_are_refused_with_their_index(quantize, bad, isa):
    w = weight(40, 128)
    w[33, 127] = bad
    w[39, 1] = bad
    with pytest.raises(ValueError, match=r"\(33, 127\)"):
        quantize(w)
    with pytest.raises(ValueError, match=r"\(1, 39\)"):
        quantize(w.T)


def test_bytes_do_not_depend_on_threads():
    w = weight(700, 640)
    results = []
    for count in (1, 2, 3):
        _bnbq.set_thread_limit(count)
        results.append(ops.quantize_4bit(w, double_quant=True))
    _bnbq.set_thread_limit(0)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
