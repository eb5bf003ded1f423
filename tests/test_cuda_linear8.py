"""LLM.int8() on CUDA: the kernels of cuda/s8_*.cu in the emulator against the specification.

int8 sums are exact and scaled in the specification's order, so without outliers y is equal bit for bit. The outliers'
fp32 sum is compared within a bound derived from what was added up.
"""

import numpy as np
import pytest

import emulated_cuda as cuda
from bnbq import reference as ref
from cases import activations, weight

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=cuda.why_not() or "")

DTYPES = ("bf16", "fp16", "fp32")


@pytest.fixture(autouse=True)
def usual_device():
    cuda.set_order(0)
    cuda.set_device()
    yield
    cuda.set_order(0)
    cuda.set_device()


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """To what the call takes; NaN stays NaN."""
    if dtype != "bf16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16 if dtype == "fp16" else np.float32)
    return np.where(np.isnan(x), np.uint16(0x7FC1), cuda.to_bf16(np.where(np.isnan(x), np.float32(0), x)))


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 256 bytes and ends where its heap block does, for the sanitizer to see."""
    block = np.empty(x.nbytes + 256, np.uint8)
    start = -block.ctypes.data % 256
    copy = block[start:start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def layer(n: int, k: int, blocksize: int = 0, seed: int = 0):
    q, absmax = ref.quantize_8bit(weight(n, k, seed), blocksize)
    return aligned(q), absmax


def linear(x, q, absmax, blocksize=0, bias=None, threshold=6.0, out="fp32", y=None, **options):
    """y in `out`, from x as narrow() made it."""
    if y is None:
        y = np.full((*x.shape[:-1], q.shape[0]), 7, {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[out])
    status = cuda.call("linear_8bit", cuda.tensor(x), cuda.weight8(q, absmax, blocksize),
                       None if bias is None else cuda.tensor(bias), cuda.c_float(threshold), cuda.tensor(y), **options)
    assert status == cuda.OK
    return y


def check(x, q, absmax, blocksize=0, bias=None, threshold=6.0, out="fp32", batch_invariant=False, **options):
    """Against the specification: equal where no outlier is added, otherwise to a bound."""
    rule = ref.outliers_per_row if batch_invariant else ref.outliers_per_column
    wide = cuda.to_f32(x).reshape(-1, x.shape[-1])
    wide_bias = None if bias is None else cuda.to_f32(bias)
    y = linear(x, q, absmax, blocksize, bias, threshold, out, batch_invariant=batch_invariant, **options)
    y = y.reshape(-1, q.shape[0])
    want = ref.linear_8bit(wide, q, absmax, wide_bias, threshold, blocksize, rule)
    mask = rule(wide, threshold)
    narrowed = narrow(want, out)
    plain = ~mask.any(1)
    np.testing.assert_array_equal(y[plain], narrowed[plain])
    got, want = cuda.to_f32(y)[~plain], cuda.to_f32(narrowed)[~plain]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(got[np.isinf(want)], want[np.isinf(want)])
    usual = np.isfinite(want)
    assert np.isfinite(got[usual]).all()
    w = np.abs(ref.dequantize_8bit(q, absmax, blocksize))
    size = np.nan_to_num(np.abs(np.where(mask, wide, 0))[~plain], posinf=0) @ w.T + np.abs(np.nan_to_num(want, posinf=0, neginf=0))
    step = {"fp32": 0, "bf16": 2.0**-7, "fp16": 2.0**-10}[out]  # one unit of what y is rounded to
    bound = (8 + mask.sum(1)[~plain, None]) * 2.0**-23 * size + step * np.abs(np.nan_to_num(want, posinf=0, neginf=0)) + 2.0**-24
    error = np.abs(np.where(usual, got.astype(np.float64) - np.where(usual, want, 0), 0))
    assert (error <= bound).all(), (error - bound).max()
    return y


def some_outliers(m: int, k: int, columns: float, dtype: str, seed: int = 1) -> np.ndarray:
    """About that part of the columns holds outliers, in some rows each."""
    rng = np.random.default_rng((seed, m, k))
    x = np.clip(rng.standard_normal((m, k), np.float32), -5.5, 5.5)
    for c in rng.choice(k, int(np.ceil(columns * k)), replace=False):
        rows = rng.random(m) < 0.5
        rows[rng.integers(m)] = True
        x[rows, c] = rng.uniform(6, 60, rows.sum()) * rng.choice((-1, 1), rows.sum())
    return aligned(narrow(x, dtype))


# m: every kernel and every fragment width; n and k: tails of tiles of 16, 32 and 128 rows, of steps of 32, 64, 512.
SHAPES = [(1, 33, 64), (1, 16, 1552), (2, 40, 96), (8, 17, 528), (9, 130, 48), (16, 31, 1040), (17, 50, 80), (33, 33, 272),
          (64, 30, 544), (65, 129, 144), (129, 150, 272)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("part", (0, 0.06))
def test_product(shape, dtype, part):
    m, n, k = shape
    check(some_outliers(m, k, part, dtype), *layer(n, k), out=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", (0, 0.06, 0.5))
@pytest.mark.parametrize("shape", [(65, 129, 128), (129, 40, 304), (130, 200, 80), (100, 17, 1040)], ids=str)
def test_warpgroup_products(monkeypatch, shape, part, dtype):
    """The kernel for 9.0 that BNBQ_CUDA_WGMMA=1 asks for; it has the other one's bits."""
    m, n, k = shape
    (q, absmax), x = layer(n, k), narrow(some_outliers(m, k, part, dtype), dtype)
    other = linear(x, q, absmax)
    monkeypatch.setenv("BNBQ_CUDA_WGMMA", "1")
    for order in (0, 1, 2):
        cuda.set_order(order)
        assert np.array_equal(linear(x, q, absmax), other)
    check(x, q, absmax, bias=np.linspace(-1, 1, n, dtype=np.float32))


@pytest.mark.parametrize("part", (0, 0.06))
def test_little_shared_memory(part):
    """99 KB, as 8.6 has: one block of 8 warps instead of two of 4."""
    cuda.set_device(86, shared_limit=99 * 1024)
    for dtype in DTYPES:
        check(some_outliers(129, 272, part, dtype), *layer(150, 272))


@pytest.mark.parametrize("blocksize", (32, 64, 256))
@pytest.mark.parametrize("shape", [(1, 20, 80), (3, 18, 272), (17, 40, 336), (129, 140, 304)], ids=str)
@pytest.mark.parametrize("part", (0, 0.1))
def test_blocks_of_columns(shape, blocksize, part):
    m, n, k = shape
    check(some_outliers(m, k, part, "bf16"), *layer(n, k, blocksize), blocksize=blocksize)


@pytest.mark.parametrize("m", (1, 5, 20, 70))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", (0.01, 0.4, 1))
@pytest.mark.parametrize("batch_invariant", (False, True))
def test_parts_of_outliers(m, dtype, part, batch_invariant):
    check(some_outliers(m, 208, part, dtype), *layer(36, 208), batch_invariant=batch_invariant)


@pytest.mark.parametrize("capability", (75, 90))
@pytest.mark.parametrize("shape", [(1, 9, 37), (3, 7, 33), (20, 19, 100), (2, 5, 1), (70, 11, 24)], ids=str)
@pytest.mark.parametrize("blocksize", (0, 32))
@pytest.mark.parametrize("batch_invariant", (False, True))
def test_odd_columns(shape, capability, blocksize, batch_invariant):
    """k that no 16-byte load takes."""
    cuda.set_device(capability)
    m, n, k = shape
    check(some_outliers(m, k, 0.1, "fp16"), *layer(n, k, blocksize), blocksize=blocksize, batch_invariant=batch_invariant)


@pytest.mark.parametrize("shape", [(1, 33, 64), (17, 20, 528), (129, 30, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_tensor_cores(shape, dtype):
    cuda.set_device(75)
    m, n, k = shape
    check(some_outliers(m, k, 0, dtype), *layer(n, k), out=dtype)
    check(some_outliers(m, k, 0.06, dtype), *layer(n, k), out=dtype)


def test_misaligned_weight():
    q, absmax = layer(20, 64)
    shifted = np.zeros(q.size + 16, np.int8)
    start = -shifted.ctypes.data % 16 + 1
    shifted = shifted[start:start + q.size].reshape(q.shape)
    shifted[...] = q
    check(some_outliers(4, 64, 0.06, "bf16"), shifted, absmax)


@pytest.mark.parametrize("capability", (75, 90))
@pytest.mark.parametrize("m", (1, 4, 40, 70))
@pytest.mark.parametrize("threshold", (0.0, 6.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(m, threshold, dtype, capability):
    cuda.set_device(capability)
    x = np.random.default_rng(m).standard_normal((m, 96), np.float32)
    x[0, :4] = -0.0, np.nan, 0.0, 30.0
    x[m // 2, 9] = np.inf
    x[-1, 50] = -np.inf
    q, absmax = layer(18, 96)
    q[2] = 0
    check(aligned(narrow(x, dtype)), q, absmax, threshold=threshold)


def test_payload_of_a_nan_does_not_matter():
    x = np.zeros((1, 32), np.float32)
    x.view(np.uint32)[0, 3] = 0x7F800001  # its top half is Inf
    assert np.isnan(linear(aligned(x), *layer(3, 32))).all()


@pytest.mark.parametrize("m", (1, 3, 70))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_huge_activations_stay_finite(m, dtype):
    """x * q overflows where x * w does not."""
    x = np.full((m, 64), 3e38, np.float32)
    x[:, 40:] = 1e-3
    y = check(aligned(narrow(x, dtype)), *layer(8, 64))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("m", (1, 2, 30, 70))
def test_extremes_of_rows(m):
    """All zero, tiny, large, one value, ties of the rounding."""
    x = np.zeros((m, 64), np.float32)
    rows = [np.zeros(64), np.full(64, 1e-40), np.full(64, -5.9), np.arange(64) / 2 * (5 / 31.5), np.where(np.arange(64) == 9, -1e-30, 0)]
    for i in range(m):
        x[i] = rows[(i + m) % len(rows)]
    check(aligned(x), *layer(12, 64), bias=np.linspace(-1, 1, 12, dtype=np.float32))


@pytest.mark.parametrize("m", (1, 10, 70))
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("capability", (75, 90))
def test_bias(m, bias_dtype, capability):
    cuda.set_device(capability)
    bias = narrow(np.random.default_rng(0).standard_normal(2 * 35).astype(np.float32), bias_dtype)[::2]
    check(some_outliers(m, 80, 0.03, "bf16"), *layer(35, 80), bias=bias, out="bf16")


@pytest.mark.parametrize("m", (3, 66))
def test_strides(m):
    """x and y with gaps, transposed, and in three dimensions."""
    q, absmax = layer(24, 80)
    x = some_outliers(2 * m, 80, 0.05, "bf16")
    want = linear(x, q, absmax)
    y = np.zeros((2 * m, 30), np.float32)
    linear(x, q, absmax, y=y[:, 3:27])
    np.testing.assert_array_equal(y[:, 3:27], want)
    assert not y[:, :3].any() and not y[:, 27:].any()
    padded = aligned(np.zeros((2 * m, 96), np.uint16))
    padded[:, 5:85] = x
    np.testing.assert_array_equal(linear(padded[:, 5:85], q, absmax), want)
    y = np.zeros((24, 2 * m), np.float32)
    linear(np.asfortranarray(x), q, absmax, y=y.T)
    np.testing.assert_array_equal(y.T, want)
    np.testing.assert_array_equal(linear(x.reshape(2, m, 80), q, absmax).reshape(2 * m, 24), want)


@pytest.mark.parametrize("blocksize", (0, 64))
def test_empty(blocksize):
    bias = np.arange(3, dtype=np.float32)
    for m, n, k in [(0, 3, 32), (2, 0, 32), (2, 3, 0), (0, 0, 0), (70, 3, 0)]:
        absmax = np.ones((n, -(-k // blocksize)) if blocksize else n, np.float32)
        y = linear(np.ones((m, k), np.float32), np.zeros((n, k), np.int8), absmax, blocksize, bias[:n])
        np.testing.assert_array_equal(y, np.broadcast_to(bias[:n], (m, n)))


def test_working_space_that_is_missing():
    x, (q, absmax) = some_outliers(3, 64, 0, "bf16"), layer(8, 64)
    y = np.zeros((3, 8), np.float32)
    arguments = cuda.tensor(x), cuda.weight8(q, absmax), None, cuda.c_float(6), cuda.tensor(y)
    for allowed in range(3):
        assert cuda.call("linear_8bit", *arguments, allowed=allowed) == cuda.NO_MEMORY
    assert cuda.call("linear_8bit", *arguments, allowed=3) == cuda.OK


@pytest.mark.parametrize(("m", "batch_invariant", "launches"), [(1, False, 1), (2, False, 2), (16, False, 2), (17, False, 3), (70, False, 3), (70, True, 2)])
def test_launches(m, batch_invariant, launches):
    x, (q, absmax) = some_outliers(m, 64, 0.05, "bf16"), layer(8, 64)
    before = cuda.launches()
    linear(x, q, absmax, out="bf16", batch_invariant=batch_invariant)
    assert cuda.launches() - before == launches


@pytest.mark.parametrize("blocksize", (0, 64))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", (75, 90))
def test_batch_invariance(blocksize, dtype, capability):
    """A row's bits are the same alone, in any batch, and at any place in it."""
    cuda.set_device(capability)
    x = some_outliers(130, 208, 0.1, dtype)
    q, absmax = layer(33, 208, blocksize)
    whole = linear(x, q, absmax, blocksize, batch_invariant=True)
    for first, m in [(0, 1), (129, 1), (3, 2), (60, 8), (7, 16), (100, 17), (1, 33), (5, 64), (64, 66)]:
        part = linear(aligned(x[first:first + m]), q, absmax, blocksize, batch_invariant=True)
        np.testing.assert_array_equal(part.view(np.uint32), whole[first:first + m].view(np.uint32))


@pytest.mark.parametrize("order", (1, 2, 3))
@pytest.mark.parametrize("capability", (75, 90))
def test_any_order_of_threads(order, capability):
    cuda.set_device(capability)
    cases = [(1, 20, 1056, 0), (10, 20, 1056, 0), (10, 20, 144, 32), (40, 40, 1056, 0), (70, 40, 144, 32), (130, 140, 400, 0)]
    for m, n, k, blocksize in cases:
        x, (q, absmax) = some_outliers(m, k, 0.05, "bf16"), layer(n, k, blocksize)
        for invariant in (False, True):
            cuda.set_order(0)
            want = linear(x, q, absmax, blocksize, batch_invariant=invariant)
            cuda.set_order(order)
            np.testing.assert_array_equal(linear(x, q, absmax, blocksize, batch_invariant=invariant), want)


def test_more_columns_than_int32_holds():
    k = (1 << 17) + 16
    x, q = np.ones((1, k), np.float32), np.full((1, k), -128, np.int8)
    absmax = np.array([127], np.float32)
    check(aligned(x), q, absmax)


def test_most_columns_of_the_tensor_cores():
    k = 1 << 17
    x, q = np.ones((2, k), np.float32), np.full((3, k), -128, np.int8)
    x[1, ::2] = -1
    x[1, -1] = 40
    check(aligned(x), aligned(q), np.full(3, 127, np.float32))


def test_activations_of_the_benchmarks():
    x = aligned(narrow(activations(12, 512, outliers=3), "bf16"))
    check(x, *layer(48, 512), out="bf16")
