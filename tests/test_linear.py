"""The products: every instruction set against the specification, within a bound derived from k."""

import numpy as np
import pytest
import torch

from bnbq import _bnbq, ops
from bnbq import reference as ref
from cases import BLOCKSIZES, FLAT_SHAPES, FORMATS, SMALL_SHAPES, activations, weight

# Unit roundoff of the output.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_within(y: torch.Tensor, want: np.ndarray, size: np.ndarray, k: int, extra: float = 0.0):
    """k fp32 roundings of the summands' total size, one rounding to the output's dtype, and `extra`
    (relative to the summands) for a kernel that rounds its inputs."""
    bound = (k * 2.0**-24 + extra) * size + ROUNDING[y.dtype] * np.abs(want) + 1e-30
    if y.dtype == torch.float16:
        bound = bound + 2.0**-25  # subnormal outputs
    error = np.abs(y.double().numpy().reshape(want.shape) - want)
    worst = np.argmax(error - bound)
    assert (error <= bound).all(), f"error {error.flat[worst]:.3e} above {bound.flat[worst]:.3e}"


def packed(n, k, name="nf4", blocksize=64, double=False):
    parts = ops.quantize_4bit(torch.from_numpy(weight(n, k)), name, blocksize, double_quant=double)
    settings = dict(absmax2=parts.absmax2, absmax_offset=parts.absmax_offset, quant_type=name, blocksize=blocksize)
    dense = ops.dequantize_4bit(parts.qweight, parts.absmax, (n, k), **settings).double().numpy()
    return parts, settings, dense


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("m,n,k", SMALL_SHAPES + FLAT_SHAPES)
def test_linear4bit(m, n, k, dtype, double, isa):
    parts, settings, dense = packed(n, k, double=double)
    x = torch.from_numpy(activations(m, k)).to(dtype)
    bias = torch.from_numpy(activations(1, n)[0]).to(dtype)
    x64 = x.double().numpy()
    y = ops.linear4bit(x, parts.qweight, parts.absmax, n, bias, **settings)
    assert y.dtype == dtype and y.shape == (m, n)
    extra = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # a bf16 kernel may round the weight
    size = np.abs(x64) @ np.abs(dense).T + np.abs(bias.double().numpy())
    assert_within(y, x64 @ dense.T + bias.double().numpy(), size, k + 1, extra)
    gy = torch.from_numpy(activations(m, n, seed=5)).to(dtype)
    gx = ops.linear4bit_backward(gy, parts.qweight, parts.absmax, k, **settings)
    assert gx.dtype == dtype and gx.shape == (m, k)
    g64 = gy.double().numpy()
    assert_within(gx, g64 @ dense, np.abs(g64) @ np.abs(dense), n, extra)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_blocksize(name, blocksize, isa):
    n, k = 37, max(2 * blocksize, 96 // blocksize * blocksize)
    parts, settings, dense = packed(n, k, name, blocksize)
    for m in (1, 5, 40):
        x = activations(m, k)
        y = ops.linear4bit(torch.from_numpy(x), parts.qweight, parts.absmax, n, **settings)
        assert_within(y, x.astype("f8") @ dense.T, np.abs(x).astype("f8") @ np.abs(dense).T, k)
        gy = activations(m, n, seed=5)
        gx = ops.linear4bit_backward(torch.from_numpy(gy), parts.qweight, parts.absmax, k, **settings)
        assert_within(gx, gy.astype("f8") @ dense, np.abs(gy).astype("f8") @ np.abs(dense), n)


def test_more_rows_than_a_tile_and_than_a_chunk(isa, threads):
    m, n, k = 1030, 70, 64
    parts, settings, dense = packed(n, k)
    x = activations(m, k)
    y = ops.linear4bit(torch.from_numpy(x), parts.qweight, parts.absmax, n, **settings)
    assert_within(y, x.astype("f8") @ dense.T, np.abs(x).astype("f8") @ np.abs(dense).T, k)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("name", FORMATS)
def test_int8_activations_are_bit_exact(name, blocksize, dtype, isa, threads):
    n, k = 75, 4096 if blocksize == 4096 else 5 * blocksize
    parts, settings, _ = packed(n, k, name, blocksize)
    bias = torch.from_numpy(activations(1, n)[0])
    for m in (1, 2, 3, 4, 5, 16, 70):
        x = torch.from_numpy(activations(m, k, outliers=3)).to(dtype)
        want = ref.linear_4bit_int8(x.float().numpy(), parts.qweight.numpy(), parts.absmax.numpy(), n, bias.numpy(), name, blocksize)
        y = ops.linear4bit(x, parts.qweight, parts.absmax, n, bias, activations="int8", **settings)
        assert torch.equal(y, torch.from_numpy(want).to(dtype)), m


def test_int8_activations_with_compute_dtype_and_double_quantisation(isa):
    parts, settings, _ = packed(40, 192, double=True)
    scales = ops.dequantize_absmax(*parts[1:]).numpy()
    x = torch.from_numpy(activations(9, 192))
    y = ops.linear4bit(x, parts.qweight, parts.absmax, 40, compute_dtype="bfloat16", activations="int8", **settings)
    want = ref.linear_4bit_int8(x.bfloat16().float().numpy(), parts.qweight.numpy(), scales, 40)
    assert np.array_equal(y.numpy(), want)


@pytest.mark.parametrize("n,k", [(0, 64), (5, 0), (5, 100)])
def test_int8_activations_change_nothing_without_whole_blocks(n, k, isa):
    parts = ops.quantize_4bit(torch.from_numpy(weight(n, k)))
    x = torch.from_numpy(activations(3, k))
    assert torch.equal(ops.linear4bit(x, *parts[:2], n, activations="int8"), ops.linear4bit(x, *parts[:2], n))


def test_non_finite_activations_in_int8(isa):
    parts = ops.quantize_4bit(torch.from_numpy(weight(20, 128)))
    x = activations(8, 128)
    x[1, 5], x[2, 100], x[6, 64] = np.nan, np.inf, -np.inf
    y = ops.linear4bit(torch.from_numpy(x), *parts[:2], 20, activations="int8")
    assert y[[1, 2, 6]].isnan().all() and y[[0, 3, 4, 5, 7]].isfinite().all()


HAS_BF16_OUTLIERS = ("avx512bf16", "amx")
HAS_BF16_BACKWARD = ("avx512bf16",)


def expected_8bit(x, q, absmax, bias, threshold, blocksize, rule=ref.outliers_per_column, many_in_bf16=False):
    """many_in_bf16: where one column in 16 is an outlier, the weights that they meet are rounded to bf16 once."""
    y = ref.linear_8bit(x, q, absmax, bias, threshold, blocksize, rule).astype("f8")
    mask = rule(x, threshold)
    dense = ref.dequantize_8bit(q, absmax, blocksize).astype("f8")
    floats = np.where(mask, x, 0).astype("f8")
    if many_in_bf16 and threshold > 0 and mask.any(0).sum() >= x.shape[1] // 16:
        rounded = torch.from_numpy(dense).bfloat16().double().numpy()
        y += floats @ (rounded - dense).T
    return y, np.abs(floats) @ np.abs(dense).T, mask.sum(1).max(initial=0)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("m,n,k", SMALL_SHAPES + FLAT_SHAPES)
def test_linear8bitlt(m, n, k, dtype, threshold, isa):
    q, absmax = ref.quantize_8bit(weight(n, k))
    x = torch.from_numpy(activations(m, k, outliers=3)).to(dtype)
    bias = torch.from_numpy(activations(1, n)[0]).to(dtype)
    y = ops.linear8bitlt(x, torch.from_numpy(q), torch.from_numpy(absmax), bias, threshold=threshold)
    want, size, outliers = expected_8bit(x.float().numpy(), q, absmax, bias.float().numpy(), threshold, 0,
                                         many_in_bf16=dtype == torch.bfloat16 and isa in HAS_BF16_OUTLIERS)
    # The int8 part is bit-exact; only the outliers' sum and the three-term sum may round differently.
    assert_within(y, want, size + 4 * np.abs(want), outliers + 2)
    gy = torch.from_numpy(activations(m, n, seed=5)).to(dtype)
    gx = ops.linear8bitlt_backward(gy, torch.from_numpy(q), torch.from_numpy(absmax))
    dense, g64 = ref.dequantize_8bit(q, absmax).astype("f8"), gy.double().numpy()
    extra = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # as above
    assert_within(gx, g64 @ dense, np.abs(g64) @ np.abs(dense), n + 3, extra)


@pytest.mark.parametrize("m,n,k", SMALL_SHAPES)
def test_linear8bitlt_looks_for_outliers_per_row_when_batch_invariant(m, n, k, isa, batch_invariant):
    q, absmax = ref.quantize_8bit(weight(n, k))
    x = activations(m, k, outliers=3)
    want, size, outliers = expected_8bit(x, q, absmax, None, 6.0, 0, ref.outliers_per_row)
    assert_within(torch.from_numpy(ops.linear8bitlt(x, q, absmax)), want, size + 4 * np.abs(want), outliers + 2)


def test_outlier_columns_are_those_of_the_whole_batch(isa):
    """More rows than one pass over the activations: the last row's outlier counts for the first."""
    q, absmax = ref.quantize_8bit(weight(20, 64))
    x = np.clip(activations(1100, 64), -5, 5)
    x[-1, 7] = 30
    want, size, outliers = expected_8bit(x, q, absmax, None, 6.0, 0)
    assert_within(torch.from_numpy(ops.linear8bitlt(x, q, absmax)), want, size + 4 * np.abs(want), outliers + 2)


@pytest.mark.parametrize("m,n,k", [(1, 5, 64), (9, 40, 320), (3, 7, 100), (70, 33, 4096 + 17)])
def test_int8_product_is_bit_exact_without_outliers(m, n, k, isa):
    q, absmax = ref.quantize_8bit(weight(n, k))
    x = activations(m, k)
    y = ops.linear8bitlt(x, q, absmax, threshold=0.0)
    assert np.array_equal(y.view(np.uint32), ref.linear_8bit(x, q, absmax, threshold=0.0).view(np.uint32))


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("m,n,k", [(1, 5, 64), (9, 40, 320), (3, 7, 100)])
def test_int8_per_block(m, n, k, blocksize, isa):
    q, absmax = ref.quantize_8bit(weight(n, k), blocksize)
    x = activations(m, k, outliers=2)
    y = ops.linear8bitlt(x, q, absmax, threshold=6.0, blocksize=blocksize)
    want, size, outliers = expected_8bit(x, q, absmax, None, 6.0, blocksize)
    assert_within(torch.from_numpy(y), want, size + 4 * np.abs(want), k // blocksize + outliers + 2)
    gy = activations(m, n, seed=5)
    dense = ref.dequantize_8bit(q, absmax, blocksize).astype("f8")
    gx = ops.linear8bitlt_backward(gy, q, absmax, blocksize=blocksize)
    assert_within(torch.from_numpy(gx), gy.astype("f8") @ dense, np.abs(gy).astype("f8") @ np.abs(dense), n + 3)


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("m,k,blocksize", [(70, 4096, 0), (200, 4096, 256), (70, 999, 0), (600, 960, 32)])
@pytest.mark.parametrize("count", [0, 1, 6, 41, 62, 63, 1638])
def test_many_outliers_of_bf16_see_weights_rounded_once(count, m, k, blocksize, invariant, isa):
    """To no more than fp32 sums, so rounding any weight differently, or a few outliers at all, shows."""
    n = 70
    rounds = isa in HAS_BF16_OUTLIERS and not invariant
    q, absmax = ref.quantize_8bit(weight(n, k), blocksize)
    x = np.clip(activations(m, k), -5, 5)
    columns = np.random.default_rng(count).permutation(k)[:count]
    x[:, columns] += 20 * np.sign(x[:, columns])
    x = torch.from_numpy(x).bfloat16()
    parts = torch.from_numpy(q), torch.from_numpy(absmax)
    want, size, outliers = expected_8bit(x.float().numpy(), q, absmax, None, 6.0, blocksize, many_in_bf16=rounds)
    _bnbq.set_batch_invariant(invariant)
    try:
        y = torch.empty(m, n)
        _bnbq.linear8bitlt(x, *parts, None, y, 6.0, blocksize)
        assert_within(y, want, size + 4 * np.abs(want), outliers + k // (blocksize or k) + 2)
        for rows in (slice(0, 1), slice(5, 11), slice(m - 7, m)):
            few = torch.empty(rows.stop - rows.start, n)
            _bnbq.linear8bitlt(x[rows], *parts, None, few, 6.0, blocksize)
            assert torch.equal(few, y[rows])
    finally:
        _bnbq.set_batch_invariant(False)


def views(gy):
    """The same gradient as it may lie in memory."""
    m, n = gy.shape
    wide = torch.full((m, n + 3), torch.nan, dtype=gy.dtype)
    wide[:, 1:n + 1] = gy
    return {"plain": gy, "part of a wider one": wide[:, 1:n + 1], "transposed": gy.t().contiguous().t()}


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("m,n,k", [(1, 1, 64), (2, 40, 320), (6, 301, 64), (7, 33, 704), (70, 300, 192), (600, 19, 96)])
def test_gradients_in_bf16_see_weights_rounded_once(m, n, k, invariant, isa):
    """To no more than fp32 sums, so rounding any weight differently, or twice, shows."""
    rounds = isa in HAS_BF16_BACKWARD and not invariant
    gy = torch.from_numpy(activations(m, n)).bfloat16()
    g64 = gy.double().numpy()

    def check(gx, dense, sums):
        dense = torch.from_numpy(dense).float()
        dense = (dense.bfloat16() if rounds else dense).double().numpy()
        assert_within(gx, g64 @ dense, np.abs(g64) @ np.abs(dense), sums)

    _bnbq.set_batch_invariant(invariant)
    try:
        parts, settings, dense = packed(n, k, blocksize=32 if k % 64 else 64, double=True)
        check(ops.linear4bit_backward(gy.float(), parts.qweight, parts.absmax, k, compute_dtype=torch.bfloat16, **settings),
              dense, n)
        for blocksize in (0, 32, 256):
            q, absmax = (torch.from_numpy(a) for a in ref.quantize_8bit(weight(n, k), blocksize))
            results = {}
            for name, view in views(gy).items():
                results[name] = torch.empty(m, k)
                _bnbq.linear8bitlt_backward(view, q, absmax, results[name], blocksize)
                assert torch.equal(results[name], results["plain"]), name
            check(results["plain"], ref.dequantize_8bit(q.numpy(), absmax.numpy(), blocksize).astype("f8"), n + 3)
    finally:
        _bnbq.set_batch_invariant(False)


def test_int8_extremes_do_not_saturate(isa):
    """+-127 and, from foreign files, -128: sums that overflow 16 bits and unsigned tricks."""
    q = np.full((33, 1000), -128, np.int8)
    q[::2] = 127
    absmax = np.ones(33, np.float32)
    x = np.ones((5, 1000), np.float32)
    x[1::2] = -1
    y = ops.linear8bitlt(x, q, absmax, threshold=0.0)
    assert np.array_equal(y, ref.linear_8bit(x, q, absmax, threshold=0.0))


def test_long_rows_leave_int32(isa):
    """k above 2^17: the int32 product is taken in parts."""
    k = (1 << 17) * 2 + 100
    q, absmax = np.full((2, k), 127, np.int8), np.ones(2, np.float32)
    x = np.ones((1, k), np.float32)
    assert np.array_equal(ops.linear8bitlt(x, q, absmax, threshold=0.0), ref.linear_8bit(x, q, absmax, threshold=0.0))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_non_finite_activations_of_int8(threshold, isa):
    x = activations(4, 128)
    x[1, 5], x[2, 6] = np.nan, np.inf
    q, absmax = ref.quantize_8bit(np.abs(weight(9, 128)) + 1)
    y = ops.linear8bitlt(x, q, absmax, threshold=threshold)
    assert np.isfinite(y[[0, 3]]).all() and np.isnan(y[1]).all() and np.isposinf(y[2]).all()


@pytest.mark.parametrize("columns", [40, 41])
def test_non_finite_activations_among_many_outliers(columns, isa):
    """Inf in the last outlier column: what an odd column is paired with must not turn it into NaN."""
    x = np.clip(activations(4, 128), -5, 5)
    x[:, :columns] = 30
    x[1, 5], x[2, columns - 1], x[3, columns - 1] = np.nan, np.inf, -np.inf
    q, absmax = ref.quantize_8bit(np.abs(weight(9, 128)) + 1)
    x = torch.from_numpy(x).bfloat16()
    y = ops.linear8bitlt(x, torch.from_numpy(q), torch.from_numpy(absmax)).float().numpy()
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and np.isposinf(y[2]).all() and np.isneginf(y[3]).all()


def test_large_activations_do_not_overflow(isa):
    """users.md's failure of a cast to fp16: 1e5 in, finite out."""
    x = torch.from_numpy(activations(3, 256)).bfloat16()
    x[0, 0] = 1e5
    q, absmax = ref.quantize_8bit(weight(8, 256) * 1e4)
    for threshold in (0.0, 6.0):
        assert torch.isfinite(ops.linear8bitlt(x, torch.from_numpy(q), torch.from_numpy(absmax), threshold=threshold)).all()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtype_rounds_x_and_nothing_narrower(compute, isa):
    parts, settings, dense = packed(24, 128)
    x = torch.from_numpy(activations(20, 128))
    y = ops.linear4bit(x, parts.qweight, parts.absmax, 24, compute_dtype=compute, **settings)
    x64 = x.to(compute).double().numpy()
    assert y.dtype == torch.float32
    assert_within(y, x64 @ dense.T, np.abs(x64) @ np.abs(dense).T, 128, 2.0**-8 if compute == torch.bfloat16 else 0)


def test_strides_and_leading_dimensions(isa):
    parts, settings, _ = packed(40, 128)
    q, absmax = (torch.from_numpy(a) for a in ref.quantize_8bit(weight(40, 128)))
    x = torch.from_numpy(activations(24, 128))
    for view in (x.view(2, 3, 4, 128), x.t().contiguous().t(), x.view(4, 6, 128).transpose(0, 1), x[::2], x[:, :].flip(0),
                 x[0], x[:1].expand(5, 128), torch.cat([x, x], 1)[:, 64:192]):
        dense = view.contiguous().clone()
        for call in (lambda v: ops.linear4bit(v, parts.qweight, parts.absmax, 40, **settings),
                     lambda v: ops.linear8bitlt(v, q, absmax)):
            assert torch.equal(call(view), call(dense)) and call(view).shape == (*view.shape[:-1], 40)


@pytest.mark.parametrize("m,n,k", [(0, 8, 64), (3, 0, 64), (0, 0, 64), (3, 8, 0), (3, 0, 0)])
def test_empty(m, n, k, isa):
    parts = ops.quantize_4bit(torch.zeros(n, k))
    q, absmax = ops.quantize_8bit(torch.zeros(n, k))
    x = torch.ones(m, k)
    assert ops.linear4bit(x, parts.qweight, parts.absmax, n).tolist() == [[0.0] * n] * m
    assert ops.linear8bitlt(x, q, absmax).tolist() == [[0.0] * n] * m
    assert ops.linear4bit_backward(torch.ones(m, n), parts.qweight, parts.absmax, k).tolist() == [[0.0] * k] * m
    assert ops.linear8bitlt_backward(torch.ones(m, n), q, absmax).tolist() == [[0.0] * k] * m
