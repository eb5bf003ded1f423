"""Quantise and dequantise with the CUDA kernels, in the emulator: every bit is reference.py's."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import emulated_cuda as cuda
from bnbq import reference as ref
from cases import BLOCKSIZES, FORMATS, awkward_blocks, formula, weight

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": cuda.F32, "bfloat16": cuda.BF16, "float16": cuda.F16}
GUARD = 64  # bytes behind each result, which nobody may write


@pytest.fixture(params=[0, 1, 5])
def order(request):
    cuda.set_order(request.param)
    yield
    cuda.set_order(0)


def as_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return {"float32": lambda: x, "bfloat16": lambda: cuda.to_bf16(x), "float16": lambda: x.astype(np.float16)}[dtype]()


def guarded(count: int, dtype) -> np.ndarray:
    """An aligned array with a guard behind it; check() looks whether it is whole."""
    size = count * np.dtype(dtype).itemsize
    space = np.full(size + GUARD + 256, 0xA5, np.uint8)
    start = -space.ctypes.data % 256
    return space[start:start + size].view(dtype)


def check(array: np.ndarray) -> np.ndarray:
    end = array.ctypes.data - array.base.ctypes.data + array.nbytes
    assert (array.base[end:end + GUARD] == 0xA5).all(), "written behind the end"
    return array


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({4: np.uint32, 2: np.uint16, 1: np.uint8}[x.itemsize])


def same(got: np.ndarray, want: np.ndarray) -> bool:
    return got.shape == want.shape and np.array_equal(bits(got), bits(np.ascontiguousarray(want)))


def quantize_4bit(w: np.ndarray, name: str, blocksize: int):
    qweight, absmax = guarded(-(-w.size // 2), np.uint8), guarded(-(-w.size // blocksize), np.float32)
    status = cuda.call("quantize_4bit", cuda.tensor(w), cuda.find_format(name), cuda.c_int64(blocksize),
                       cuda.c_void_p(qweight.ctypes.data), cuda.c_void_p(absmax.ctypes.data))
    assert status == cuda.OK
    return check(qweight), check(absmax)


def dequantize_4bit(packed, out: np.ndarray, name: str, blocksize: int) -> np.ndarray:
    """Into `out`, of any strides."""
    n, k = out.size // out.shape[-1], out.shape[-1]
    assert cuda.call("dequantize_4bit", cuda.weight4(packed, name, blocksize, n, k), cuda.tensor(out)) == cuda.OK
    return out


def quantize_absmax(absmax: np.ndarray):
    codes, absmax2, offset = guarded(absmax.size, np.uint8), guarded(-(-absmax.size // 256), np.float32), guarded(1, np.float32)
    pointers = [cuda.c_void_p(a.ctypes.data) for a in (absmax, codes, absmax2, offset)]
    assert cuda.call("quantize_absmax", pointers[0], cuda.c_int64(absmax.size), *pointers[1:]) == cuda.OK
    return check(codes), check(absmax2), check(offset)


def quantize_8bit(w: np.ndarray, blocksize: int):
    n, k = w.size // max(w.shape[-1], 1) if w.shape[-1] else w.shape[0], w.shape[-1]
    blocks = -(-k // blocksize) if blocksize else 1
    qweight, absmax = guarded(n * k, np.int8), guarded(n * blocks, np.float32)
    status = cuda.call("quantize_8bit", cuda.tensor(w), cuda.c_int64(blocksize), cuda.c_void_p(qweight.ctypes.data),
                       cuda.c_void_p(absmax.ctypes.data))
    assert status == cuda.OK
    return check(qweight).reshape(n, k), check(absmax).reshape((n, blocks) if blocksize else (n,))


def dequantize_8bit(q, absmax, blocksize: int, out: np.ndarray) -> np.ndarray:
    assert cuda.call("dequantize_8bit", cuda.weight8(q, absmax, blocksize), cuda.tensor(out)) == cuda.OK
    return out


def assert_4bit(w: np.ndarray, name: str, blocksize: int, out_dtype: str | None = None) -> None:
    """There, equal to the reference, and back again."""
    packed = quantize_4bit(w, name, blocksize)
    want = ref.quantize_4bit(cuda.to_f32(w), name, blocksize)
    assert same(packed[0], want[0]) and same(packed[1], want[1]), (name, blocksize, w.dtype, w.shape)
    dense = as_dtype(ref.dequantize_4bit(*want, w.shape, name, blocksize), out_dtype or "float32")
    out = guarded(w.size, dense.dtype)
    dequantize_4bit(packed, out, name, blocksize)
    assert same(check(out), dense.ravel()), (name, blocksize, w.shape, out_dtype)


# ------------------------------------------------------------------ 4 bit

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_4bit_of_awkward_blocks_and_tails(name, blocksize, dtype):
    """The short block at the end has one value, or an odd number of them, or lacks one."""
    awkward = awkward_blocks(blocksize, ref.FORMATS[name].thresholds)
    awkward = np.where(np.abs(awkward) > 6e4, np.float32(6e4), awkward) if dtype == "float16" else awkward
    for tail in (0, 1, blocksize // 2 + 1, blocksize - 1):
        w = np.concatenate([awkward.ravel(), weight(1, blocksize)[0, :tail]])
        assert_4bit(as_dtype(w, dtype), name, blocksize, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_4bit_every_dtype_to_every_dtype(dtype, out, order):
    for name, blocksize in (("nf4", 64), ("fp4", 32), ("int4", 1024)):
        assert_4bit(as_dtype(weight(33, 257), dtype), name, blocksize, out)


@pytest.mark.parametrize("blocksize", (32, 256, 4096))
def test_4bit_of_any_count(blocksize, order):
    """One value, and the edges of units, of blocks and of what a block of threads holds (4096 or 8192)."""
    for count in (1, 2, 3, 7, 9, 31, 33, 255, 4095, 4097, 8191, 8193, 16385):
        assert_4bit(weight(1, count)[0], "nf4", blocksize)
        assert_4bit(as_dtype(weight(1, count)[0], "bfloat16"), "nf4", blocksize, "bfloat16")


def test_4bit_short_blocks_are_divided_and_have_no_zero_scale():
    for tail in (np.zeros(5, np.float32), np.full(3, 1e-40, np.float32), np.float32([0.3, -0.7, 0.11])):
        w = np.concatenate([weight(1, 64)[0], tail])
        assert quantize_4bit(w, "nf4", 64)[1][1] >= np.float32(1e-38)
        assert_4bit(w, "nf4", 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_strides(dtype):
    w = as_dtype(weight(24, 96), dtype)
    wide = np.zeros((24, 130), w.dtype)
    wide[:, 5:101] = w
    flat = np.zeros(w.size + 1, w.dtype)
    flat[1:] = w.ravel()
    views = (w.T.copy().T, wide[:, 5:101], w[::-1].copy()[::-1], np.broadcast_to(w[0], (7, 96)), w.reshape(4, 6, 96).swapaxes(0, 1),
             flat[1:])  # not aligned to 16 bytes
    for view in views:
        packed = quantize_4bit(view, "nf4", 64)
        want = ref.quantize_4bit(cuda.to_f32(np.ascontiguousarray(view)), "nf4", 64)
        assert same(packed[0], want[0]) and same(packed[1], want[1])
    packed = ref.quantize_4bit(cuda.to_f32(w), "nf4", 64)
    dense = as_dtype(ref.dequantize_4bit(*packed, w.shape, "nf4", 64), dtype)
    for out in (np.empty((96, 24), w.dtype).T, np.zeros((24, 130), w.dtype)[:, 5:101], np.empty(w.size + 1, w.dtype)[1:].reshape(24, 96)):
        assert same(np.ascontiguousarray(dequantize_4bit(packed, out, "nf4", 64)), dense)


def test_4bit_codes_at_any_address():
    w = weight(9, 100)
    packed = ref.quantize_4bit(w, "nf4", 64)
    odd = np.empty(packed[0].size + 1, np.uint8)[1:]
    odd[:] = packed[0]
    out = dequantize_4bit((odd, packed[1]), np.empty((9, 100), np.float32), "nf4", 64)
    assert same(out, ref.dequantize_4bit(*packed, (9, 100), "nf4", 64))
    odd[:] = 0
    absmax = np.empty(15, np.float32)
    cuda.call("quantize_4bit", cuda.tensor(w), cuda.find_format("nf4"), cuda.c_int64(64), cuda.c_void_p(odd.ctypes.data),
              cuda.c_void_p(absmax.ctypes.data))
    assert same(odd, packed[0]) and same(absmax, packed[1])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_values_show_in_their_absmax_alone(dtype, bad):
    w = weight(3, 5000)
    w[1, 33] = bad
    w[2, -1] = bad
    x = w.astype(np.float16) if dtype == "float16" else w if dtype == "float32" else (w.view(np.uint32) >> 16).astype(np.uint16)
    finite = np.where(np.isfinite(cuda.to_f32(x)), cuda.to_f32(x), np.float32(0))
    for blocksize in (64, 4096):
        _, absmax = quantize_4bit(x, "nf4", blocksize)
        hit = np.zeros(absmax.size, bool)
        hit[[5033 // blocksize, 14999 // blocksize]] = True
        assert not np.isfinite(absmax[hit]).any() and np.isnan(absmax[hit]).all() == np.isnan(bad)
        assert same(absmax[~hit], ref.quantize_4bit(finite, "nf4", blocksize)[1][~hit])
    q, absmax = quantize_8bit(x, 0)
    assert not np.isfinite(absmax[1:]).any() and np.isnan(absmax[1:]).all() == np.isnan(bad)
    assert same(q[0], ref.quantize_8bit(finite[:1])[0][0]) and same(absmax[:1], ref.quantize_8bit(finite[:1])[1])


# ------------------------------------------------------------------ scales

# 300_000: three levels of sums.
@pytest.mark.parametrize("count", [1, 2, 31, 255, 256, 257, 5000, 8192, 8193, 65536, 65537, 300_000])
def test_double_quantisation(count, order):
    absmax = np.exp2(np.random.default_rng(count).uniform(-20, 20, count)).astype(np.float32)
    absmax[0] = 0
    want = ref.quantize_absmax(absmax)
    for got, part in zip(quantize_absmax(absmax), want, strict=True):
        assert same(got, part)
    out = guarded(count, np.float32)
    assert cuda.call("dequantize_absmax", cuda.scales(*want), cuda.c_int64(count), cuda.c_void_p(out.ctypes.data)) == cuda.OK
    assert same(check(out), ref.dequantize_absmax(*want))


def test_double_quantisation_of_scales_that_are_ties_or_equal():
    midpoints = (ref.DYNAMIC_MAP[:-1] + ref.DYNAMIC_MAP[1:]) / np.float32(2)
    ties = np.concatenate([[1, -1], midpoints, np.nextafter(midpoints, np.float32(2)), -midpoints]).astype(np.float32)
    ties = np.concatenate([ties, -ties])  # the mean is zero
    for absmax in (ties, np.full(300, 0.37, np.float32), np.zeros(300, np.float32), np.full(300, 1e-40, np.float32)):
        for got, part in zip(quantize_absmax(absmax), ref.quantize_absmax(absmax), strict=True):
            assert same(got, part)


def test_no_scales():
    codes, absmax2, offset = quantize_absmax(np.empty(0, np.float32))
    assert codes.size == absmax2.size == 0 and offset[0] == 0


def test_plain_scales_are_copied():
    absmax = weight(1, 300)[0]
    out = guarded(300, np.float32)
    assert cuda.call("dequantize_absmax", cuda.scales(absmax), cuda.c_int64(300), cuda.c_void_p(out.ctypes.data)) == cuda.OK
    assert same(check(out), absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", (32, 64, 512))
def test_dequantise_decodes_double_quantised_scales(dtype, blocksize, order):
    w = weight(31, 1111)
    qweight, absmax = ref.quantize_4bit(w, "nf4", blocksize)
    packed = (qweight, *ref.quantize_absmax(absmax))
    want = as_dtype(ref.dequantize_4bit(qweight, ref.dequantize_absmax(*packed[1:]), w.shape, "nf4", blocksize), dtype)
    before = cuda.launches()
    out = guarded(w.size, want.dtype)
    dequantize_4bit(packed, out, "nf4", blocksize)
    assert same(check(out), want.ravel()) and cuda.launches() == before + 1


# ------------------------------------------------------------------ 8 bit

# Rows of one value, of less than a unit, of a few units of a warp, of several warps, and longer than 512 threads hold.
ROWS = [(1, 1), (300, 1), (77, 3), (5, 64), (33, 100), (17, 257), (9, 1032), (3, 4104), (2, 20_000), (1, 33_001)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", (0, 32, 64, 512, 4096))
def test_int8(blocksize, dtype):
    for shape in ROWS:
        w = as_dtype(weight(*shape), dtype)
        w[0, ::3] = 0
        w[-1, -1] = as_dtype(np.float32([-1e-38]), dtype)[0]
        q, absmax = quantize_8bit(w, blocksize)
        want = ref.quantize_8bit(cuda.to_f32(w), blocksize)
        assert same(q, want[0]) and same(absmax, want[1]), shape
        dense = as_dtype(ref.dequantize_8bit(*want, blocksize), dtype)
        out = guarded(w.size, dense.dtype)
        dequantize_8bit(q, absmax, blocksize, out.reshape(shape))
        assert same(check(out), dense.ravel()), shape


def test_int8_in_any_order_of_threads(order):
    for shape, blocksize in (((3, 4104), 0), ((2, 9001), 0), ((40, 200), 64), ((2, 9000), 4096)):
        w = weight(*shape)
        want = ref.quantize_8bit(w, blocksize)
        q, absmax = quantize_8bit(w, blocksize)
        assert same(q, want[0]) and same(absmax, want[1])
        out = dequantize_8bit(q, absmax, blocksize, np.empty(shape, np.float32))
        assert same(out, ref.dequantize_8bit(*want, blocksize))


def test_int8_ties_round_to_even():
    w = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, -127]])
    q, _ = quantize_8bit(w, 0)
    assert same(q, ref.quantize_8bit(w)[0]) and q[0, 1:7].tolist() == [0, 2, 2, 0, -2, -2]


def test_int8_tiny_and_huge_rows():
    w = np.stack([np.full(20, v, np.float32) for v in (0, 1e-40, 1e-37, 1e-36, 3e38)])
    q, absmax = quantize_8bit(w, 0)
    want = ref.quantize_8bit(w)
    assert same(q, want[0]) and same(absmax, want[1])


def test_int8_strides():
    w = weight(24, 96)
    wide = np.zeros((24, 130), np.float32)
    wide[:, 5:101] = w
    want = ref.quantize_8bit(w)
    for view in (w.T.copy().T, wide[:, 5:101], w[::-1].copy()[::-1], w.reshape(4, 6, 96)):
        q, absmax = quantize_8bit(view, 0)
        assert same(q, want[0]) and same(absmax, want[1])
    for out in (np.empty((96, 24), np.float32).T, np.zeros((24, 130), np.float32)[:, 5:101]):
        assert same(np.ascontiguousarray(dequantize_8bit(*want, 0, out)), ref.dequantize_8bit(*want))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_empty_weights(shape):
    w = np.empty(shape, np.float32)
    qweight, absmax = quantize_4bit(w, "nf4", 64)
    assert qweight.size == absmax.size == 0
    weight4 = cuda.weight4((qweight, absmax), "nf4", 64, *shape)
    assert cuda.call("dequantize_4bit", weight4, cuda.tensor(w)) == cuda.OK
    for blocksize in (0, 64):
        q, absmax = quantize_8bit(w, blocksize)
        assert q.size == 0 and absmax.shape == ((shape[0], -(-shape[1] // 64)) if blocksize else shape[:1])
        assert not absmax.any()
        dequantize_8bit(q, absmax, blocksize, w)


# ------------------------------------------------------------------ golden vectors and failures

def hexed(array: np.ndarray) -> str:
    return np.ascontiguousarray(array).tobytes().hex()


@pytest.mark.parametrize("name", FORMATS)
def test_golden_4bit(name):
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    w = formula(**stored["input"])
    for row in stored["vectors"]:
        qweight, absmax = quantize_4bit(w, name, row["blocksize"])
        assert hexed(qweight) == row["qweight"] and hexed(absmax) == row["absmax"], row["blocksize"]
        codes, absmax2, offset = quantize_absmax(absmax)
        assert (hexed(codes), hexed(absmax2), hexed(offset)) == (row["absmax_codes"], row["absmax2"], row["offset"])
        dense = dequantize_4bit((qweight, absmax), np.empty(w.size, np.float32), name, row["blocksize"])
        assert zlib.crc32(dense.tobytes()) == row["dense_crc32"]


def test_golden_8bit():
    stored = json.loads((GOLDEN / "int8.json").read_text())
    shape = stored["input"]["shape"]
    w = formula(shape[0] * shape[1], stored["input"]["seed"]).reshape(shape)
    for row in stored["vectors"]:
        q, absmax = quantize_8bit(w, row["blocksize"])
        assert hexed(q) == row["qweight"] and hexed(absmax) == row["absmax"], row["blocksize"]


def test_no_space_for_a_copy_is_said():
    w = weight(8, 96).T
    qweight, absmax = np.empty(384, np.uint8), np.empty(12, np.float32)
    for name, arguments in (
        ("quantize_4bit", (cuda.tensor(w), cuda.find_format("nf4"), cuda.c_int64(64), qweight, absmax)),
        ("quantize_8bit", (cuda.tensor(w), cuda.c_int64(0), np.empty(768, np.int8), np.empty(96, np.float32))),
        ("quantize_absmax", (absmax, cuda.c_int64(12), np.empty(12, np.uint8), np.empty(1, np.float32), np.empty(1, np.float32))),
    ):
        pointers = [cuda.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        assert cuda.call(name, *pointers, allowed=0) == cuda.NO_MEMORY


def test_a_failed_launch_is_said():
    cuda.library().emulator_fail_next_launch(b"invalid argument")
    with pytest.raises(cuda.DeviceError, match="invalid argument"):
        quantize_4bit(weight(4, 64), "nf4", 64)
    assert_4bit(weight(4, 64), "nf4", 64)
