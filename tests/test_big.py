"""More than 2^31 elements: slow-marked, within 6 GB of memory."""

import numpy as np
import pytest

from bnbq import ops

pytestmark = pytest.mark.slow


def test_weight_of_more_than_two_to_the_31_elements():
    """A 4-bit weight of 2^31 + 2^21 elements is 1.03 GiB; only its last rows differ from zero, so a
    32-bit index anywhere gives zeros or the wrong row."""
    k = 1 << 21
    n = (1 << 10) + 1
    tail = np.random.default_rng(0).standard_normal((1, k)).astype(np.float32)
    zero = ops.quantize_4bit(np.zeros((1, k), np.float32))
    last = ops.quantize_4bit(tail)
    qweight = np.empty((n, k // 2), np.uint8)
    absmax = np.zeros((n, k // 64), np.float32)
    qweight[:] = zero.qweight
    qweight[-1], absmax[-1] = last.qweight[0], last.absmax[0]
    x = np.zeros((1, k), np.float32)
    x[0, -1] = 2
    dense = ops.dequantize_4bit(last.qweight, last.absmax, (1, k))
    y = ops.linear4bit(x, qweight, absmax, n)
    assert not y[0, :-1].any() and y[0, -1] == 2 * dense[0, -1]
    gy = np.zeros((1, n), np.float32)
    gy[0, -1] = 1
    assert np.array_equal(ops.linear4bit_backward(gy, qweight, absmax, k), dense)


def test_int8_weight_of_more_than_two_to_the_31_elements():
    k = (1 << 17) + 64
    n = (1 << 14) + 64
    q = np.zeros((n, k), np.int8)
    absmax = np.ones(n, np.float32)
    q[-1, -1] = 127
    x = np.zeros((1, k), np.float32)
    x[0, -1] = 3
    y = ops.linear8bitlt(x, q, absmax, threshold=0.0)
    assert not y[0, :-1].any() and abs(y[0, -1] - 3) < 1e-5


def test_quantising_more_than_two_to_the_31_elements():
    """The source is one row seen 2^11 times (stride 0), so only the output is large."""
    row = np.random.default_rng(1).standard_normal((1, (1 << 20) + 64)).astype(np.float32)
    w = np.broadcast_to(row, (1 << 11, row.shape[1]))
    assert w.size > 1 << 31
    packed = ops.quantize_4bit(w)
    one = ops.quantize_4bit(row)
    assert np.array_equal(packed.qweight[-1], one.qweight[0]) and np.array_equal(packed.absmax[-1], one.absmax[0])
    assert np.array_equal(packed.qweight[1000], one.qweight[0])
