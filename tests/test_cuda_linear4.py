"""The GPU's 4-bit product, run by the emulator, against the specification."""

import ctypes

import numpy as np
import pytest

import emulated_cuda as cuda
from bnbq import reference as ref
from cases import BLOCKSIZES, FLAT_SHAPES, FORMATS, SMALL_SHAPES, activations, weight

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

DTYPES = {"bf16": cuda.BF16, "f16": cuda.F16, "f32": cuda.F32}
ROUNDING = {cuda.F32: 2.0**-24, cuda.BF16: 2.0**-8, cuda.F16: 2.0**-11}
# Edges of the tiles: 16 rows of W per tile, 8 to 64 rows of x per block, 64 columns per step and 8 warps that share them.
EDGES = ((1, 15, 64), (8, 17, 576), (9, 1, 192), (16, 33, 1088), (32, 65, 320), (33, 129, 64), (64, 16, 128), (65, 40, 256), (129, 17, 64))


@pytest.fixture(autouse=True)
def a_plain_device():
    cuda.set_device()
    cuda.set_order(0)
    yield
    cuda.set_device()
    cuda.set_order(0)


def to(x: np.ndarray, dtype: int) -> np.ndarray:
    return {cuda.F32: np.float32, cuda.F16: np.float16}[dtype](x) if dtype != cuda.BF16 else cuda.to_bf16(x)


def rounded(x: np.ndarray, dtype: int) -> np.ndarray:
    return cuda.to_f32(to(x, dtype))


def explain(m, n, k, blocksize, compute, batch_invariant=False, capability=90, processors=4) -> str:
    function = cuda.library().bnbq_cuda_explain_4bit
    function.restype = ctypes.c_char_p
    shape = [ctypes.c_int64(i) for i in (m, n, k, blocksize)]
    return function(*shape, compute, ctypes.c_bool(batch_invariant), capability, processors).decode()


class Packed:
    """A weight [n, k] as the kernels take it and in float64."""

    def __init__(self, n, k, quant_type="nf4", blocksize=64, double=False, w=None):
        self.n, self.k, self.quant_type, self.blocksize = n, k, quant_type, blocksize
        self.qweight, self.absmax = ref.quantize_4bit(weight(n, k) if w is None else w, quant_type, blocksize)
        self.parts = (self.qweight, self.absmax)
        if double:
            second = ref.quantize_absmax(self.absmax)
            self.parts, self.absmax = (self.qweight, *second), ref.dequantize_absmax(*second)

    def argument(self) -> cuda.Weight4:
        return cuda.weight4(self.parts, self.quant_type, self.blocksize, self.n, self.k)

    def dense(self, codebook_dtype: int) -> np.ndarray:
        """float64[n, k]; mma kernels round the codebook, not the weight."""
        size = self.n * self.k
        codes = np.stack([self.qweight >> 4, self.qweight & 15], 1).ravel()[:size]
        codebook = rounded(ref.find_format(self.quant_type).codebook, codebook_dtype).astype("f8")
        scales = np.repeat(self.absmax.astype("f8"), self.blocksize)[:size]
        return (codebook[codes] * scales).reshape(self.n, self.k)


def linear(x, packed, bias=None, compute=cuda.F32, y=None, **options) -> np.ndarray:
    y = np.full((len(x), packed.n), np.nan, np.float32) if y is None else y
    arguments = cuda.tensor(x), packed.argument(), None if bias is None else cuda.tensor(bias), compute, cuda.tensor(y)
    assert cuda.call("linear_4bit", *arguments, **options) == cuda.OK
    return y


def check(y, x, packed, bias=None, compute=cuda.F32, mma=None):
    """Within k + 2 fp32 roundings of the summands' total size, one for the scale's product, and y's rounding."""
    mma = compute != cuda.F32 and packed.k % packed.blocksize == 0 if mma is None else mma
    x = rounded(cuda.to_f32(x), compute).astype("f8")
    dense = packed.dense(compute if mma else cuda.F32)
    b = np.zeros(packed.n) if bias is None else cuda.to_f32(bias).astype("f8")
    want = x @ dense.T + b
    dtype = cuda.dtype_of(y)
    bound = (packed.k + 3) * 2.0**-24 * (np.abs(x) @ np.abs(dense).T + np.abs(b)) + ROUNDING[dtype] * np.abs(want) + 1e-30
    bound = bound + (2.0**-25 if dtype == cuda.F16 else 0)
    error = np.abs(cuda.to_f32(y) - want)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound, at {np.argwhere(~(error <= bound))[:4].tolist()}"


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m,n,k", SMALL_SHAPES + FLAT_SHAPES + EDGES)
def test_shapes(m, n, k, compute, double):
    packed = Packed(n, k, double=double)
    x = to(activations(m, k), compute)
    bias = to(activations(1, n)[0], compute)
    for processors in {1, 4} if not double else {4}:  # one tile of rows per warp, or two
        cuda.set_device(processors=processors)
        check(linear(x, packed, bias, compute), x, packed, bias, compute)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_every_format_and_blocksize(quant_type, blocksize, double):
    n, k = 9, blocksize if blocksize > 1024 else 3 * blocksize
    packed = Packed(n, k, quant_type, blocksize, double)
    for m, compute in ((2, cuda.BF16), (9, cuda.F16), (20, cuda.BF16), (34, cuda.F16), (3, cuda.F32), (12, cuda.F32)):
        if m > 16 and blocksize > 256:
            continue
        x = to(activations(m, k), compute)
        check(linear(x, packed, compute=compute), x, packed, compute=compute)


@pytest.mark.parametrize("m,n,k", [(3, 20, 96), (20, 40, 160), (40, 70, 32), (70, 17, 352)])
def test_blocks_of_32_where_the_last_step_is_half_a_step(m, n, k):
    for compute, double in ((cuda.BF16, False), (cuda.F16, True)):
        packed = Packed(n, k, blocksize=32, double=double)
        x = to(activations(m, k), compute)
        check(linear(x, packed, compute=compute), x, packed, compute=compute)


@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m,n,k", [(1, 33, 1024), (7, 20, 640), (16, 70, 512), (30, 40, 256), (70, 130, 128), (5, 7, 65), (20, 7, 65)])
def test_small_integers_are_exact(m, n, k, compute):
    """Codes of -1, 0 and 1, which every format and dtype holds: any wrong index shows, however small its effect."""
    rng = np.random.default_rng(m)
    for quant_type in ("nf4", "int4"):
        packed = Packed(n, k, quant_type, 64)
        codebook = ref.find_format(quant_type).codebook
        exact = np.flatnonzero(np.isin(codebook, (-1, 0, 1)))
        codes = rng.choice(exact, (packed.qweight.size, 2))
        packed.qweight[:] = codes[:, 0] << 4 | codes[:, 1]
        packed.absmax[:] = rng.integers(1, 9, packed.absmax.size)
        x = rng.integers(-8, 9, (m, k)).astype(np.float32)
        y = linear(to(x, compute), packed, compute=compute)
        assert np.array_equal(y, x.astype("f8") @ packed.dense(cuda.F32).T)


def views(matrix):
    """The same matrix as it may lie in memory."""
    m, n = matrix.shape
    wide, apart = np.zeros((m, n + 3), matrix.dtype), np.zeros((m, 2 * n), matrix.dtype)
    wide[:, 1:n + 1], apart[:, ::2] = matrix, matrix
    aligned = np.zeros((m, n + 8), matrix.dtype)
    aligned[:, :n] = matrix
    return {"plain": matrix, "wide": wide[:, 1:n + 1], "apart": apart[:, ::2], "turned": np.ascontiguousarray(matrix.T).T,
            "reversed": np.ascontiguousarray(matrix[::-1])[::-1], "aligned": aligned[:, :n]}


@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("y_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_and_strides(x_dtype, y_dtype, compute):
    m, n, k = 5, 19, 128
    packed = Packed(n, k)
    x, bias = to(activations(m, k), x_dtype), to(activations(1, n)[0], y_dtype)
    want = linear(x, packed, bias, compute, to(np.zeros((m, n), np.float32), y_dtype))
    check(want, x, packed, bias, compute)
    for view in views(x).values():
        y = to(np.zeros((m, n), np.float32), y_dtype)
        assert np.array_equal(linear(view, packed, np.repeat(bias, 3)[::3], compute, y), want)
    for name, view in views(np.zeros_like(want)).items():
        around = view.base.copy() if view.base is not None else None
        view[:] = 7
        before = None if around is None else view.base.copy()
        linear(x, packed, bias, compute, view)
        assert np.array_equal(view, want), name
        if name in ("wide", "apart", "aligned"):  # nothing beside it has changed
            view[:] = 7
            assert np.array_equal(view.base, before), name


def test_leading_dimensions_are_rows():
    packed = Packed(10, 64)
    x = to(activations(6, 64), cuda.BF16).reshape(2, 3, 64)
    y = linear(x, packed, None, cuda.BF16, np.zeros((2, 3, 10), np.float32))
    check(y.reshape(6, 10), x.reshape(6, 64), packed, compute=cuda.BF16)


@pytest.mark.parametrize("m,n,k,compute", [(3, 40, 640, cuda.BF16), (12, 40, 640, cuda.F16), (40, 70, 320, cuda.BF16), (70, 130, 128, cuda.F16),
                                           (3, 10, 520, cuda.F32), (70, 70, 100, cuda.F32)])
def test_the_order_of_threads_changes_nothing(m, n, k, compute):
    packed = Packed(n, k, double=True)
    x = to(activations(m, k), compute)
    want = linear(x, packed, compute=compute)
    for order in (1, 2, 3, 4):
        cuda.set_order(order)
        assert np.array_equal(linear(x, packed, compute=compute), want)


@pytest.mark.parametrize("n,k,blocksize,compute", [(20, 320, 64, cuda.BF16), (20, 320, 64, cuda.F32), (35, 96, 32, cuda.F16), (6, 33, 64, cuda.BF16)])
def test_batch_invariance(n, k, blocksize, compute):
    packed = Packed(n, k, blocksize=blocksize)
    x = to(activations(70, k), compute)
    want = linear(x, packed, compute=compute, batch_invariant=True)
    check(want, x, packed, compute=compute)
    for m in range(1, 70) if compute != cuda.F32 and k % blocksize == 0 else (1, 4, 5, 8, 9, 17, 33, 69):
        first = (70 - m) // 2
        y = linear(x[first:first + m], packed, compute=compute, batch_invariant=True)
        assert np.array_equal(y, want[first:first + m]), m
    cuda.set_device(processors=1)  # two tiles of rows per warp
    assert np.array_equal(linear(x[:3], packed, compute=compute, batch_invariant=True), want[:3])


@pytest.mark.parametrize("m", [1, 6, 33])
@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
def test_processors_before_8_0(compute, m):
    cuda.set_device(capability=75)
    packed = Packed(11, 192, double=True)
    x = to(activations(m, 192), compute)
    check(linear(x, packed, compute=compute), x, packed, compute=compute, mma=False)


@pytest.mark.parametrize("compute", [cuda.BF16, cuda.F32])
def test_a_packed_weight_that_starts_anywhere(compute):
    packed = Packed(11, 192)
    moved = np.zeros(packed.qweight.size + 3, np.uint8)
    moved[3:] = packed.qweight
    packed.parts = (moved[3:], packed.absmax)
    x = to(activations(4, 192), compute)
    check(linear(x, packed, compute=compute), x, packed, compute=compute, mma=False)


@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m,k", [(3, 128), (12, 128), (40, 128), (70, 192), (5, 33), (12, 33)])
def test_nan_and_inf_stay_in_their_row(m, k, compute):
    packed = Packed(20, k)
    x = activations(m, k)
    want = linear(to(x, compute), packed, compute=compute)
    x[1, 3], x[m - 1, k - 1] = np.nan, np.inf
    bad = x.astype(np.float16).view(np.uint16) if compute == cuda.F16 else None
    bad = x.astype(np.float16) if bad is not None else x if compute == cuda.F32 else cuda.to_bf16(np.nan_to_num(x, posinf=1))
    if compute == cuda.BF16:
        bad[1, 3], bad[m - 1, k - 1] = 0x7FC0, 0x7F80
    y = linear(bad, packed, compute=compute)
    assert not np.isfinite(y[[1, m - 1]]).any()
    others = [i for i in range(m) if i not in (1, m - 1)]
    assert np.array_equal(y[others], want[others])


def test_a_scale_that_is_not_finite_stays_in_its_row():
    packed = Packed(40, 128)
    want = {m: linear(to(activations(m, 128), cuda.BF16), packed, compute=cuda.BF16) for m in (2, 20, 40)}
    packed.absmax[2 * 17] = np.nan
    for m, before in want.items():
        y = linear(to(activations(m, 128), cuda.BF16), packed, compute=cuda.BF16)
        assert np.isnan(y[:, 17]).all()
        assert np.array_equal(np.delete(y, 17, 1), np.delete(before, 17, 1))


def test_large_and_small_scales_do_not_pass_through_16_bits():
    for m in (2, 40):
        for size in (1e30, 1e-30):
            packed = Packed(20, 128, w=weight(20, 128) * np.float32(size))
            x = to(activations(m, 128), cuda.F16)
            check(linear(x, packed, compute=cuda.F16), x, packed, compute=cuda.F16)


@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
def test_empty_shapes(compute):
    packed = Packed(5, 64)
    assert linear(np.zeros((0, 64), np.float32), packed, compute=compute).shape == (0, 5)
    nothing = Packed(0, 64)
    assert linear(np.zeros((3, 64), np.float32), nothing, compute=compute).shape == (3, 0)
    bias = activations(1, 5)[0]
    for m in (1, 3, 20):
        x, without = np.zeros((m, 0), np.float32), Packed(5, 0)
        assert np.array_equal(linear(x, without, compute=compute), np.zeros((m, 5)))
        assert np.array_equal(linear(x, without, bias, compute), np.broadcast_to(bias, (m, 5)))


def test_working_space_is_for_what_has_to_be_copied():
    packed = Packed(9, 128)
    x = to(activations(3, 128), cuda.BF16)
    before = cuda.launches()
    linear(x, packed, compute=cuda.BF16, allowed=0)
    assert cuda.launches() == before + 1
    y = np.zeros((3, 9), np.float32)
    x = activations(3, 128)  # in another dtype than the product
    arguments = [cuda.tensor(x), packed.argument(), None, cuda.BF16, cuda.tensor(y)]
    assert cuda.call("linear_4bit", *arguments, allowed=0) == cuda.NO_MEMORY
    assert cuda.call("linear_4bit", *arguments, allowed=1) == cuda.OK


@pytest.mark.parametrize("compute", DTYPES.values(), ids=DTYPES)
def test_a_failed_launch_is_reported(compute):
    packed = Packed(9, 128)
    x = to(activations(3, 128), compute)
    cuda.library().emulator_fail_next_launch(b"out of patience")
    with pytest.raises(cuda.DeviceError, match="out of patience"):
        linear(x, packed, compute=compute)


def test_the_choice_of_kernels():
    sizes = (1, 15, 16, 17, 576, 1024, 4096, 7392, 7393, 14336, 28672, 128256)
    for m in (*range(1, 300), 1000, 4096, 100000):
        for n in sizes:
            for blocksize in (32, 64, 4096):
                for processors in (1, 46, 132, 148):
                    ask = dict(processors=processors)
                    assert explain(m, n, 4096, blocksize, cuda.F32, **ask) == ("fma tile" if m > 8 else "fma stream")
                    kernel = explain(m, n, 4096, blocksize, cuda.BF16, **ask)
                    assert kernel == explain(m, n, 4096, blocksize, cuda.F16, **ask)
                    tokens, tiles = map(int, kernel.split(",")[0].removeprefix("mma ").split("x"))
                    assert (blocksize == 32) == kernel.endswith("blocks of 32")
                    assert tokens >= min(m, 32) and (tokens // 2 < m or blocksize == 32 or tokens == 8)
                    invariant = explain(m, n, 4096, blocksize, cuda.BF16, True, **ask)
                    assert invariant == explain(1, n, 4096, blocksize, cuda.BF16, True, **ask) and invariant.startswith("mma 16x")
                    if n >= 28672 and blocksize == 64 and m <= 16:
                        assert tiles == 2
    for odd in (dict(k=100), dict(k=0), dict(k=4096, capability=75), dict(k=2**31), dict(k=4096, n=2**30)):
        shape = {"n": 64, "capability": 90, **odd}
        for m in (1, 8, 9, 500):
            kernel = explain(m, shape["n"], shape["k"], 64, cuda.BF16, capability=shape["capability"])
            assert kernel == ("fma tile" if m > 8 else "fma stream")
        assert explain(500, shape["n"], shape["k"], 64, cuda.BF16, True, capability=shape["capability"]) == "fma stream"
