"""How tensors come in: every producer, any strides, and nothing kept or written that should not be."""

import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from bnbq import _bnbq, ops
from cases import activations, weight

N, K = 12, 64
QWEIGHT, ABSMAX = ops.quantize_4bit(weight(N, K))[:2]
QWEIGHT8, ABSMAX8 = ops.quantize_8bit(weight(N, K))
X = activations(6, K)
Y = ops.linear4bit(X, QWEIGHT, ABSMAX, N)


def linear4bit(x, out, qweight=QWEIGHT, absmax=ABSMAX, bias=None):
    return _bnbq.linear4bit(x, qweight, absmax, None, None, bias, out, "nf4", 64, None, None)


class Producer:
    """An array that speaks DLPack only, version 1.x (with keywords) or 0.x (without)."""

    def __init__(self, array, version=1, device=(1, 0)):
        self.array, self.version, self.device = array, version, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **keywords):
        if self.version == 0:
            if keywords:
                raise TypeError("__dlpack__() got an unexpected keyword argument")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**keywords)


# ------------------------------------------------------------------ strides


def embed(array, *, step=1, flip=False, transpose=False):
    """The same values with other strides."""
    if transpose:
        return np.ascontiguousarray(array.T).T
    big = np.full((*array.shape[:-1], array.shape[-1] * step), np.nan, array.dtype)
    view = big[..., ::step]
    if flip:
        view = view[..., ::-1]
    view[...] = array
    return view


STRIDED = {
    "every third": {"step": 3},
    "backwards": {"flip": True},
    "backwards by two": {"step": 2, "flip": True},
    "transposed": {"transpose": True},
}


@pytest.mark.parametrize("how", STRIDED)
def test_inputs_of_any_strides(how):
    x, bias = embed(X, **STRIDED[how]), embed(activations(1, N), **STRIDED[how])[0]
    assert np.array_equal(linear4bit(x, N), Y)
    assert np.array_equal(linear4bit(x, N, bias=bias), linear4bit(X, N, bias=bias.copy()))
    w = embed(weight(N, K), **STRIDED[how])
    assert np.array_equal(ops.quantize_4bit(w).qweight, QWEIGHT)
    assert np.array_equal(ops.quantize_8bit(w)[0], QWEIGHT8)
    assert np.array_equal(ops.linear8bitlt(x, QWEIGHT8, ABSMAX8), ops.linear8bitlt(X, QWEIGHT8, ABSMAX8))


@pytest.mark.parametrize("how, convert", [
    *((how, lambda a: a) for how in STRIDED),
    *((how, torch.from_numpy) for how in STRIDED if not STRIDED[how].get("flip")),  # torch has no negative strides
])
def test_outputs_of_any_strides_are_filled_and_their_gaps_left(how, convert):
    out = embed(np.zeros_like(Y), **STRIDED[how])
    around = out if out.base is None else out.base
    gaps = np.isnan(around)
    assert linear4bit(X, convert(out)) is None
    assert np.array_equal(out, Y) and np.array_equal(np.isnan(around), gaps)
    dense = embed(np.zeros((N, K), np.float32), **STRIDED[how])
    _bnbq.dequantize_4bit(QWEIGHT, ABSMAX, None, None, convert(dense), "nf4", 64)
    assert np.array_equal(dense, ops.dequantize_4bit(QWEIGHT, ABSMAX, (N, K)))


def test_broadcast_inputs():
    row = np.broadcast_to(X[:1], (6, K))
    assert row.strides[0] == 0 and np.array_equal(linear4bit(row, N), np.broadcast_to(Y[:1], (6, N)))
    one = np.broadcast_to(np.float32(2), (3, K))
    assert np.array_equal(linear4bit(one, N), linear4bit(np.full((3, K), 2, np.float32), N))


@pytest.mark.parametrize("shape", [(2, 3), (1, 6), (6, 1), (1, 2, 1, 3, 1), (1,) * 20 + (6,)], ids=str)
def test_many_dimensions_are_merged(shape):
    assert np.array_equal(linear4bit(X.reshape(*shape, K), N), Y.reshape(*shape, N))


def test_unmergeable_dimensions():
    x = np.zeros((2,) * 7 + (K,), np.float32)[(slice(None, None, -1),) * 7].transpose(6, 5, 4, 3, 2, 1, 0, 7)
    assert np.array_equal(linear4bit(x, N), np.zeros((2,) * 7 + (N,)))
    x = np.zeros((2,) * 9 + (K,), np.float32).transpose(*range(8, -1, -1), 9)
    with pytest.raises(ValueError, match="linear4bit: x has more than 8 dimensions of unrelated strides"):
        linear4bit(x, N)


# ------------------------------------------------------------------ producers


@pytest.mark.parametrize("version", [0, 1])
def test_dlpack_objects(version):
    out = np.zeros((6, N), np.float32)
    arguments = [Producer(a, version) for a in (X, out, QWEIGHT, ABSMAX)]
    assert linear4bit(*arguments) is None
    assert np.array_equal(out, Y)


def test_dlpack_objects_in_ops():
    assert np.array_equal(ops.linear4bit(Producer(X), QWEIGHT, ABSMAX, N), Y)
    assert np.array_equal(ops.quantize_8bit(Producer(weight(N, K)))[0], QWEIGHT8)


def test_memory_is_borrowed_and_given_back():
    class Array(np.ndarray):
        pass

    for failing in (False, True):
        x = X.copy().view(Array)
        before = sys.getrefcount(x)
        if failing:
            with pytest.raises(ValueError, match="out has shape"):
                linear4bit(Producer(x), Producer(np.zeros((5, N), np.float32)))
        else:
            linear4bit(Producer(x), np.empty((6, N), np.float32))
        assert sys.getrefcount(x) == before
        dead = weakref.ref(x)
        del x
        assert dead() is None


def test_torch_tensors_are_not_kept():
    x = torch.from_numpy(X.copy())
    dead = weakref.ref(x)
    y = linear4bit(x, N, *map(torch.from_numpy, (QWEIGHT, ABSMAX)))
    del x
    assert dead() is None and type(y) is torch.Tensor


def test_torch_without_the_exchange_api():
    """torch before 2.10: tensors come through __dlpack__, results from new_empty."""
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from bnbq import ops
torch.manual_seed(0)
packed = ops.quantize_4bit(torch.randn(8, 64), double_quant=True)
x, bias = torch.nn.Parameter(torch.randn(2, 3, 64)), torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
y = ops.linear4bit(x, *packed[:2], 8, bias, absmax2=packed[2], absmax_offset=packed[3])
y.sum().backward()
print(tuple(y.shape), tuple(x.grad.shape), bias.grad.tolist() == [6] * 8, tuple(ops.linear8bitlt(
    x.detach().half(), *ops.quantize_8bit(torch.randn(8, 64))).shape))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "(2, 3, 8) (2, 3, 64) True (2, 3, 8)", run.stderr


def test_parameters_and_tensors_with_history():
    x = torch.nn.Parameter(torch.from_numpy(X.copy()))
    for tensor in (x, x * 1):
        y = linear4bit(tensor, N)
        assert not y.requires_grad and np.array_equal(y.numpy(), Y)


def test_results_are_like_x():
    x = torch.from_numpy(X)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = linear4bit(x.to(dtype), N)
        assert (type(y), y.dtype, y.shape, y.is_contiguous()) == (torch.Tensor, dtype, (6, N), True)
        y.add_(1).resize_(0)
    y = linear4bit(X.astype(np.float16), N)
    assert (type(y), y.dtype, y.flags.owndata) == (np.ndarray, np.float16, True)


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (3, 0, K)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_ordinary_tensors(shape, dtype):
    """Their memory is ours: aligned as torch's own, alive as long as any view of it, of the right size."""
    x = torch.ones(shape, dtype=dtype)
    y = linear4bit(x, N)
    want = y.clone()
    assert y.shape == (*shape[:-1], N) and y.is_contiguous() and y.data_ptr() % 64 == 0
    assert y.untyped_storage().nbytes() == want.numel() * dtype.itemsize
    view = y[..., 3:]
    del x, y
    others = [linear4bit(torch.full(shape, 9, dtype=dtype), N) for _ in range(50)]
    assert torch.equal(view, want[..., 3:]) and len(others) == 50


def test_results_are_freed():
    code = """
import resource, torch
from bnbq import ops
packed = ops.quantize_4bit(torch.randn(64, 64))
x = torch.randn(16384, 64)
for turn in range(201):
    ops.linear4bit(x, *packed[:2], 64).T  # 4 MiB, and a view of it
    if turn == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10)  # KiB; sanitizers keep 256 MiB
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


def test_kinds_may_be_mixed():
    out = torch.zeros(6, N)
    linear4bit(X, out, torch.from_numpy(QWEIGHT), Producer(ABSMAX))
    assert np.array_equal(out.numpy(), Y)


def test_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16")
    y = linear4bit(X.astype(ml_dtypes.bfloat16), N)
    want = linear4bit(torch.from_numpy(X).bfloat16(), N)
    assert y.dtype == ml_dtypes.bfloat16 and np.array_equal(y.view(np.int16), want.view(torch.int16).numpy())


def test_read_only_inputs_are_fine_and_outputs_refused():
    x, out = X.copy(), np.empty((6, N), np.float32)
    x.flags.writeable = out.flags.writeable = False
    assert np.array_equal(linear4bit(x, N), Y)
    assert linear4bit(Producer(x), np.empty((6, N), np.float32)) is None
    for refused in (out, Producer(out)):
        with pytest.raises(ValueError, match="linear4bit: out is read-only"):
            linear4bit(X, refused)


# ------------------------------------------------------------------ refused


def overlapping_outputs():
    flat = np.zeros(6 * N + K, np.float32)
    strided = np.lib.stride_tricks.as_strided
    return {
        "stride 0": strided(flat, (6, N), (0, 4)),
        "rows that overlap": strided(flat, (6, N), (4 * (N - 1), 4)),
        "a row on the next": strided(flat, (6, N), (4, 4)),
        "columns and rows of one stride": strided(flat, (6, N), (8, 8)),
        "torch expand": torch.zeros(N).expand(6, N),
    }


@pytest.mark.parametrize("name", overlapping_outputs())
def test_outputs_that_overlap_themselves(name):
    with pytest.raises(ValueError, match="linear4bit: out overlaps itself"):
        linear4bit(X, overlapping_outputs()[name])


def test_outputs_that_share_memory_with_inputs():
    x = np.zeros((6, N + K), np.float32)
    with pytest.raises(ValueError, match="out shares memory with x"):
        linear4bit(x[:, :K], x[:, K:])
    qweight = np.zeros((N, K // 2), np.uint8)
    with pytest.raises(ValueError, match="qweight shares memory with absmax"):
        _bnbq.quantize_4bit(weight(N, K), qweight, qweight.reshape(-1)[:N * 4].view(np.float32), "nf4", 64)
    out = torch.zeros(6, N)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        linear4bit(X, out, bias=out[2])


@pytest.mark.parametrize("make, error, message", [
    (lambda: X.astype(np.float64), TypeError, "x is float64, wanted float32, bfloat16 or float16"),
    (lambda: torch.from_numpy(X).double(), TypeError, "x is float64, wanted"),
    (lambda: torch.from_numpy(X).cfloat(), TypeError, "x is complex64, wanted"),
    (lambda: torch.from_numpy(X) > 0, TypeError, "x is bool, wanted"),
    (lambda: torch.zeros(6, K, dtype=torch.int64), TypeError, "x is int64, wanted"),
    (lambda: torch.zeros(6, K).to(torch.float8_e4m3fn), TypeError, "x is float8"),
    (lambda: X.astype(">f4"), TypeError, "x is not in native byte order"),
    (lambda: X.astype(object), TypeError, "x is object, wanted"),
    (lambda: np.zeros((6, K), "f4,u1")["f0"], ValueError, "x has a stride of 5 bytes"),
    (lambda: np.frombuffer(bytes(6 * K * 4 + 1), np.uint8)[1:].view(np.float32).reshape(6, K), ValueError, "not aligned"),
    (lambda: np.float32(1), TypeError, "x is a float32, wanted a tensor or an array"),
    (lambda: X.tolist(), TypeError, "x is a list, wanted a tensor or an array"),
    (lambda: np.ndarray, TypeError, "x is a type, wanted"),
    (lambda: torch.Tensor, TypeError, "x is a _TensorMeta, wanted"),
    (lambda: None, TypeError, "x is a NoneType, wanted"),
    (lambda: torch.empty(6, K, device="meta"), RuntimeError, "x gives no access to its memory"),
    (lambda: torch.zeros(6, K).to_sparse(), RuntimeError, "x gives no access to its memory"),
    (lambda: torch.zeros(6, K).to_sparse_csr(), RuntimeError, "x gives no access to its memory"),
    (lambda: torch.zeros(6, K).to_mkldnn(), RuntimeError, "x gives no access to its memory"),
    (lambda: torch.quantize_per_tensor(torch.zeros(6, K), 1, 0, torch.quint8), (RuntimeError, TypeError), "x "),
    (lambda: torch.nn.UninitializedParameter(), RuntimeError, "x "),
    (lambda: torch.complex(*[torch.zeros(6, K)] * 2).conj().imag, RuntimeError, r"negative bit set, wanted x.resolve_neg\(\)"),
    (lambda: Producer(X, device=(2, 1)), RuntimeError, "x is a Producer, on a GPU wanted a torch.Tensor"
     if _bnbq.build_info()["cuda"] else "x is on cuda:1, and this build of bnbq has no CUDA"),
    (lambda: Producer(X, device=(8, 0)), RuntimeError, "x is on a device of DLPack type 8"),
    (lambda: Producer(X, device="cpu"), RuntimeError, "x gives no access to its memory"),
    (lambda: Producer(X, device=(1 << 40, 0)), RuntimeError, "x gives no access to its memory"),
    (lambda: Producer(X.astype(np.float64)), TypeError, "x is float64"),
    (lambda: Producer(X.astype("U")), RuntimeError, "x gives no access to its memory"),
], ids=range(28))
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantized tensor creation")
def test_what_x_cannot_be(make, error, message):
    with pytest.raises(error, match=f"linear4bit: .*{message}"):
        linear4bit(make(), np.zeros((6, N), np.float32))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_of_their_own():
    from torch._subclasses import FakeTensorMode

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (6, K), dtype=torch.float32)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("nobody may compute with it")

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.from_numpy(X))
        with pytest.raises(RuntimeError, match="x is a FakeTensor, which has no memory of its own"):
            linear4bit(fake, np.zeros((6, N), np.float32))
    with pytest.raises(RuntimeError, match="x is a Wrapper, which has no memory of its own"):
        linear4bit(Wrapper(), np.zeros((6, N), np.float32))


def test_a_second_device_is_named():
    with pytest.raises(RuntimeError, match="x is on the CPU and qweight on cuda:0, wanted all on one device"):
        linear4bit(X, N, qweight=Producer(QWEIGHT, device=(2, 0)))


def test_bad_producers():
    class Bad(Producer):
        def __init__(self, answer):
            super().__init__(X)
            self.answer = answer

        def __dlpack__(self, **keywords):
            return self.answer() if callable(self.answer) else self.answer

    def fail(error):
        raise error

    used = X.__dlpack__()
    torch.from_dlpack(type("Once", (), {"__dlpack__": lambda self, **k: used, "__dlpack_device__": lambda self: (1, 0)})())
    for answer, error, message in [
        (None, TypeError, "did not give a DLPack capsule"),
        (used, TypeError, "did not give a DLPack capsule"),
        (lambda: fail(BufferError("no")), RuntimeError, "x gives no access to its memory: no"),
        (lambda: fail(TypeError("no")), RuntimeError, "x gives no access to its memory: no"),
        (lambda: fail(KeyboardInterrupt()), KeyboardInterrupt, None),
        (lambda: fail(MemoryError()), MemoryError, None),
    ]:
        with pytest.raises(error, match=message):
            linear4bit(Bad(answer), N)


def test_scales_of_a_tensor_may_be_int32_of_the_same_bits():
    """Inputs only: nobody who asks for scales wants them so."""
    w = torch.from_numpy(weight(N, K))
    qweight, absmax = ops.quantize_8bit(w)
    bits = absmax.view(torch.int32)
    assert torch.equal(ops.dequantize_8bit(qweight, bits), ops.dequantize_8bit(qweight, absmax))
    with pytest.raises(TypeError, match="quantize_8bit: absmax is int32, wanted float32"):
        _bnbq.quantize_8bit(w, qweight, bits, 0)
    with pytest.raises(TypeError, match="dequantize_8bit: absmax is float16, wanted float32 .*protect_scales"):
        ops.dequantize_8bit(qweight, absmax.half())
