"""Bad arguments: the right exception, a message that helps, and a process that lives."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bnbq import _bnbq, ops
from cases import activations, weight

N, K = 6, 4096
W, X, GY, BIAS = weight(N, K), activations(3, K), activations(3, N), activations(1, N)[0]
Q4, A4, A2, OFFSET = ops.quantize_4bit(W, double_quant=True)
A = ops.quantize_4bit(W).absmax
FLAT4, FLAT_A = ops.quantize_4bit(W.ravel()[:-1])[:2]
Q8, A8 = ops.quantize_8bit(W)


def linear4bit(x=X, qweight=Q4, absmax=A, absmax2=None, offset=None, bias=None, out=N, quant_type="nf4", blocksize=64,
               compute_dtype=None, activations=None):
    return _bnbq.linear4bit(x, qweight, absmax, absmax2, offset, bias, out, quant_type, blocksize, compute_dtype,
                            activations)


def backward4bit(gy=GY, qweight=Q4, absmax=A, out=K, blocksize=64, compute_dtype=None):
    return _bnbq.linear4bit_backward(gy, qweight, absmax, None, None, out, "nf4", blocksize, compute_dtype)


def linear8bitlt(x=X, qweight=Q8, absmax=A8, bias=None, out=None, threshold=6.0, blocksize=0):
    return _bnbq.linear8bitlt(x, qweight, absmax, bias, out, threshold, blocksize)


def backward8bit(gy=GY, qweight=Q8, absmax=A8, out=None, blocksize=0):
    return _bnbq.linear8bitlt_backward(gy, qweight, absmax, out, blocksize)


def quantize4(w=W, qweight=None, absmax=None, quant_type="nf4", blocksize=64):
    qweight = np.empty_like(Q4) if qweight is None else qweight
    return _bnbq.quantize_4bit(w, qweight, np.empty_like(A) if absmax is None else absmax, quant_type, blocksize)


def quantize8(w=W, absmax=None, blocksize=0):
    return _bnbq.quantize_8bit(w, np.empty_like(Q8), np.empty_like(A8) if absmax is None else absmax, blocksize)


WRONG = [
    # shapes
    (lambda: linear4bit(X[:, :4095]), ValueError, "linear4bit: x has 4095 columns, the weight has k = 4096"),
    (lambda: linear4bit(out=5), ValueError, "linear4bit: out has 5 columns, the weight has n = 6"),
    (lambda: linear4bit(out=12, x=X[:, :2048].copy()), ValueError, "linear4bit: x has 2048 columns, the weight has k = 4096"),
    (lambda: linear4bit(qweight=FLAT4, absmax=FLAT_A, out=5), ValueError,
     "linear4bit: qweight has shape (12288,), wanted 10240 bytes for a weight [n = 5, k = 4096]"),
    (lambda: linear4bit(out=np.empty((2, N), np.float32)), ValueError,
     "linear4bit: out has shape (2, 6), wanted the leading dimensions of x, (3, 4096)"),
    (lambda: linear4bit(x=np.zeros((), np.float32)), ValueError, "linear4bit: x has shape (), wanted at least one dimension"),
    (lambda: linear4bit(bias=BIAS[:5]), ValueError, "linear4bit: bias has shape (5,), wanted (6,)"),
    (lambda: linear4bit(bias=BIAS.reshape(1, N)), ValueError, "linear4bit: bias has shape (1, 6), wanted (6,)"),
    (lambda: linear4bit(absmax=A[:, :-1].copy()), ValueError, "linear4bit: absmax has shape (6, 63), wanted 384 elements"),
    (lambda: linear4bit(absmax=A4, absmax2=A2[:1], offset=OFFSET), ValueError, "linear4bit: absmax2 has shape (1,), wanted 2 elements"),
    (lambda: linear4bit(absmax=A4, absmax2=A2, offset=A2), ValueError, "linear4bit: absmax_offset has shape (2,), wanted 1 elements"),
    (lambda: linear4bit(qweight=Q4[:, ::2]), ValueError, "linear4bit: qweight is not contiguous"),
    (lambda: linear4bit(qweight=torch.from_numpy(Q4).T), ValueError, "linear4bit: qweight is not contiguous"),
    (lambda: backward4bit(GY[:, :5]), ValueError, "linear4bit_backward: gy has 5 columns, the weight has n = 6"),
    (lambda: backward4bit(out=64), ValueError, "linear4bit_backward: out has 64 columns, the weight has k = 4096"),
    (lambda: linear8bitlt(X[:, :64]), ValueError, "linear8bitlt: x has 64 columns, the weight has k = 4096"),
    (lambda: linear8bitlt(out=7), ValueError, "linear8bitlt: out has 7 columns, the weight has n = 6"),
    (lambda: linear8bitlt(qweight=Q8.ravel()), ValueError, "linear8bitlt: qweight has shape (24576,), wanted (n, k)"),
    (lambda: linear8bitlt(absmax=A8[:5]), ValueError, "linear8bitlt: absmax has shape (5,), wanted 6 elements"),
    (lambda: linear8bitlt(blocksize=64), ValueError, "linear8bitlt: absmax has shape (6,), wanted 384 elements"),
    (lambda: backward8bit(GY[:, :5]), ValueError, "linear8bitlt_backward: gy has 5 columns, the weight has n = 6"),
    (lambda: quantize4(W[:5]), ValueError, "quantize_4bit: qweight has shape (6, 2048), wanted 10240 elements"),
    (lambda: quantize4(absmax=A[:5]), ValueError, "quantize_4bit: absmax has shape (5, 64), wanted 384 elements"),
    (lambda: quantize8(W[:5]), ValueError, "quantize_8bit: w has shape (5, 4096), wanted that of qweight, (6, 4096)"),
    (lambda: ops.quantize_8bit(W[0]), ValueError, "quantize_8bit: w has shape (4096,), wanted (n, k)"),
    (lambda: ops.dequantize_4bit(Q4, A, (N, K + 64)), ValueError,
     "dequantize_4bit: qweight has shape (6, 2048), wanted 12480 bytes for a weight [n = 6, k = 4160]"),
    # values
    (lambda: linear4bit(blocksize=48), ValueError, "linear4bit: blocksize is 48, wanted 32, 64, 128, 256, 512, 1024, 2048 or 4096"),
    (lambda: linear4bit(blocksize=0), ValueError, "linear4bit: blocksize is 0, wanted 32,"),
    (lambda: linear4bit(blocksize=-64), ValueError, "linear4bit: blocksize is -64, wanted 32,"),
    (lambda: linear4bit(blocksize=2**70), ValueError, "linear4bit: blocksize is 1180591620717411303424, which is too large"),
    (lambda: linear4bit(blocksize=64.0), TypeError, "linear4bit: blocksize is 64.0, wanted an int"),
    (lambda: linear4bit(blocksize=True), TypeError, "linear4bit: blocksize is True, wanted an int"),
    (lambda: linear8bitlt(blocksize=1), ValueError, "linear8bitlt: blocksize is 1, wanted 0 (one block per row), 32, 64"),
    (lambda: ops.quantize_4bit(W, blocksize=0), ValueError, "quantize_4bit: blocksize is 0, wanted one of 32, 64"),
    (lambda: ops.quantize_8bit(W, blocksize="64"), TypeError, "quantize_8bit: blocksize is '64', wanted one of 0, 32, 64"),
    (lambda: linear4bit(quant_type="nf3"), ValueError, "linear4bit: quant_type is 'nf3', wanted one of nf4, fp4, int4"),
    (lambda: linear4bit(quant_type="nf4\0"), ValueError, "linear4bit: quant_type is 'nf4\\x00', wanted one of"),
    (lambda: linear4bit(quant_type="\ud800"), ValueError, "linear4bit: quant_type is '\\ud800', wanted one of"),
    (lambda: linear4bit(quant_type=4), TypeError, "linear4bit: quant_type is 4, wanted a str"),
    (lambda: linear4bit(compute_dtype="int8"), ValueError, "linear4bit: compute_dtype is 'int8', wanted 'float32', 'bfloat16', 'float16' or None"),
    (lambda: linear4bit(activations="int4"), ValueError, "linear4bit: activations is 'int4', wanted 'int8' or None"),
    (lambda: linear4bit(activations=8), TypeError, "linear4bit: activations is 8, wanted a str or None"),
    (lambda: linear4bit(compute_dtype=8), TypeError, "linear4bit: compute_dtype is 8, wanted a str or None"),
    (lambda: ops.linear4bit(torch.from_numpy(X), Q4, A, N, compute_dtype=torch.uint8), ValueError,
     "linear4bit: compute_dtype is torch.uint8, wanted float32, bfloat16, float16 or None"),
    (lambda: ops.linear4bit(torch.from_numpy(X), Q4, A, N, compute_dtype=8), TypeError, "linear4bit: compute_dtype is 8, wanted"),
    (lambda: linear8bitlt(threshold=-1), ValueError, "linear8bitlt: threshold is -1, wanted at least 0"),
    (lambda: linear8bitlt(threshold=float("nan")), ValueError, "linear8bitlt: threshold is nan, wanted at least 0"),
    (lambda: linear8bitlt(threshold="6"), TypeError, "linear8bitlt: threshold is '6', wanted a float"),
    (lambda: linear4bit(out=-1), ValueError, "linear4bit: out is -1, wanted at least 0 columns"),
    (lambda: linear4bit(out=None), TypeError, "linear4bit: out is a NoneType, wanted a tensor or an array"),
    # kinds
    (lambda: linear4bit(qweight=Q8), TypeError, "linear4bit: qweight is int8, wanted uint8"),
    (lambda: linear8bitlt(qweight=Q4), TypeError, "linear8bitlt: qweight is uint8, wanted int8"),
    (lambda: linear4bit(absmax=A4), TypeError, "linear4bit: absmax is uint8, wanted float32"),
    (lambda: linear4bit(absmax=A.astype(np.float16)), TypeError, "linear4bit: absmax is float16, wanted float32"),
    (lambda: linear4bit(absmax=A, absmax2=A2, offset=OFFSET), TypeError, "linear4bit: absmax is float32, wanted uint8"),
    (lambda: linear4bit(absmax=A4, absmax2=A2), TypeError, "linear4bit: absmax_offset is None and absmax2 is not; wanted both or none"),
    (lambda: linear4bit(absmax=A4, offset=OFFSET), TypeError, "linear4bit: absmax2 is None and absmax_offset is not; wanted both or none"),
    (lambda: linear4bit(bias=BIAS.astype(int)), TypeError, "linear4bit: bias is int64, wanted float32, bfloat16 or float16"),
    (lambda: linear4bit(out=np.empty((3, N))), TypeError, "linear4bit: out is float64, wanted float32, bfloat16 or float16"),
    (lambda: ops.dequantize_absmax(A4, None, OFFSET), TypeError, "dequantize_absmax: absmax2 is None, wanted a tensor"),
    (lambda: ops.linear4bit([1.0], Q4, A, N), TypeError, "linear4bit: x is a list, wanted a tensor or an array"),
    (lambda: ops.quantize_4bit(3), TypeError, "quantize_4bit: w is a int, wanted a tensor or an array"),
    (lambda: _bnbq.linear4bit(), TypeError, "linear4bit: got 0 arguments, wanted 11"),
    (lambda: _bnbq.quantize_8bit(*[None] * 5), TypeError, "quantize_8bit: got 5 arguments, wanted 4"),
    (lambda: _bnbq.set_isa("sse9"), ValueError, "set_isa: sse9 is not an instruction set of this CPU, wanted one of ('scalar'"),
    (lambda: _bnbq.set_isa(3), TypeError, "set_isa: name is 3, wanted a str"),
    (lambda: _bnbq.set_thread_limit(-1), ValueError, "set_thread_limit: threads is -1, wanted 0 (no limit)"),
    (lambda: _bnbq.set_thread_limit(2**80), ValueError, "set_thread_limit: threads is 1208925819614629174706176"),
    (lambda: _bnbq.set_thread_limit(1.5), TypeError, "set_thread_limit: threads is 1.5, wanted an int"),
]


@pytest.mark.parametrize("call, error, message", WRONG, ids=[w[2][:60] for w in WRONG])
def test_message(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite(value, dtype):
    w = torch.zeros(2, 5, 64, dtype=dtype)
    w[1, 3, 17] = w[1, 4, 0] = float(value)
    with pytest.raises(ValueError, match=re.escape(f"quantize_4bit: w has {value} at index (1, 3, 17)")):
        ops.quantize_4bit(w)
    with pytest.raises(ValueError, match=re.escape(f"quantize_4bit: w has {value} at index (0, 4)")):
        ops.quantize_4bit(w[1].T)
    for blocksize in (0, 32):
        with pytest.raises(ValueError, match=re.escape(f"quantize_8bit: w has {value} at index (3, 17)")):
            ops.quantize_8bit(w[1], blocksize)


def test_failed_calls_change_no_output():
    w = W.copy()
    w[5, 4095] = np.nan
    out = np.full((3, N), 7, np.float32)
    for call in (lambda: linear4bit(out=out, bias=BIAS[:5]), lambda: linear4bit(out=out, blocksize=3)):
        with pytest.raises(ValueError):
            call()
        assert (out == 7).all()


def test_no_memory_is_an_exception():
    x = np.lib.stride_tricks.as_strided(X, (2**40, K), (0, 4))
    with pytest.raises(MemoryError):
        linear4bit(x)
    with pytest.raises((MemoryError, RuntimeError), match=r"linear4bit: out cannot be allocated"):
        linear4bit(torch.ones(1).expand(2**40, K))


def test_impossible_shapes():
    """Sizes whose products leave 64 bits come from strides of zero, or from producers that lie."""
    huge = torch.ones(1).expand(2**40, 2**22)
    with pytest.raises(ValueError, match="x has 64 columns"):
        ops.linear4bit(torch.zeros(1, 64), torch.empty(0, 2**62, dtype=torch.uint8), torch.zeros(0), 0)
    for call in (lambda: quantize4(huge), lambda: ops.quantize_8bit(huge), lambda: linear4bit(huge),
                 lambda: backward4bit(huge), lambda: linear4bit(out=2**62), lambda: linear4bit(out=2**63 - 1)):
        with pytest.raises((ValueError, MemoryError, RuntimeError)):
            call()


def test_bnbq_isa_is_checked_at_import():
    """An unknown BNBQ_ISA must not be taken for "the default"."""
    code = "import os; os.environ['BNBQ_ISA'] = 'axv2'; import bnbq._bnbq"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ValueError: BNBQ_ISA: axv2 is not an instruction set of this CPU, wanted one of ('scalar'" in run.stderr
    code = "import os; os.environ['BNBQ_ISA'] = 'scalar'; import bnbq._bnbq as b; print(b.isa())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "scalar"


# ------------------------------------------------------------------ anything at all


class Hostile:
    """Everything that C may ask of it fails."""

    def __getattribute__(self, name):
        raise ZeroDivisionError(name)

    def __repr__(self):
        raise ZeroDivisionError

    __len__ = __index__ = __float__ = __bool__ = __repr__


def anything():
    """Objects that fit no argument, and tensors that nearly do."""
    tensors = [Q4, A, A4, A2, OFFSET, Q8, A8, X, GY, BIAS, W, FLAT4, FLAT_A]
    for array in list(tensors):
        tensors += [torch.from_numpy(array), array[::-1], array[..., ::2], array[:0], array.T, array.astype(np.float64)]
        tensors += [np.broadcast_to(array[:1], (2**44, *array.shape[1:])), torch.nn.Parameter(torch.from_numpy(array), False)]
    return tensors + [
        None, True, 0, 1, -1, 64, K, N, 2**31, 2**63, -(2**63), 2**64, 2**100, 1.5, float("nan"), float("inf"), 1e308, "", "nf4",
        "fp4", "float32", "bfloat16", "x" * 1000, "\0", "\ud800", b"nf4", bytearray(4), memoryview(b"abcd"), (), [], {}, (1, 2),
        object(), Hostile(), type, int, np.ndarray, torch.Tensor, torch.float32, np.float32(1), np.zeros(()), np.zeros(0),
        np.zeros((3, 0)), np.zeros((0, 3), np.float32), np.array("text"), np.array([object()]), np.zeros(3, "M8[s]"), np.zeros(2, "f4,i4"),
        torch.zeros(()), torch.zeros(0), torch.zeros(2, 0, 3), torch.empty(3, K, device="meta"), torch.zeros(3, K).to_sparse(),
        torch.zeros(3, K, dtype=torch.complex64), torch.zeros(1).expand(2**40, K), X.__dlpack__(), lambda: None, Exception, ...,
    ]


GOOD = {
    "quantize_4bit": lambda: (W, np.empty_like(Q4), np.empty_like(A), "nf4", 64),
    "dequantize_4bit": lambda: (Q4, A, None, None, np.empty_like(W), "nf4", 64),
    "quantize_absmax": lambda: (A, np.empty_like(A4), np.empty_like(A2), np.empty_like(OFFSET)),
    "dequantize_absmax": lambda: (A4, A2, OFFSET, np.empty_like(A)),
    "quantize_8bit": lambda: (W, np.empty_like(Q8), np.empty_like(A8), 0),
    "dequantize_8bit": lambda: (Q8, A8, np.empty_like(W), 0),
    "linear4bit": lambda: (X, Q4, A, None, None, BIAS, N, "nf4", 64, None, None),
    "linear4bit_backward": lambda: (GY, Q4, A, None, None, K, "nf4", 64, None),
    "linear8bitlt": lambda: (X, Q8, A8, BIAS, None, 6.0, 0),
    "linear8bitlt_backward": lambda: (GY, Q8, A8, None, 0),
    "set_isa": lambda: ("scalar",),
    "set_thread_limit": lambda: (0,),
    "set_batch_invariant": lambda: (False,),
}
EXPECTED = (TypeError, ValueError, RuntimeError, MemoryError, ZeroDivisionError)


@pytest.mark.parametrize("name", GOOD)
def test_anything_may_be_passed(name):
    """One to three arguments of a good call are replaced at random; whatever happens is an exception."""
    function, objects, rng = getattr(_bnbq, name), anything(), random.Random(name)
    isa = _bnbq.isa()
    function(*GOOD[name]())
    try:
        raised = 0
        for _ in range(1500):
            arguments = list(GOOD[name]())
            for _ in range(rng.choice((1, 1, 2, 3))):
                arguments[rng.randrange(len(arguments))] = rng.choice(objects)
            try:
                function(*arguments)
            except EXPECTED:
                raised += 1
        assert raised > 100
    finally:
        _bnbq.set_isa(isa)
        _bnbq.set_thread_limit(0)
        _bnbq.set_batch_invariant(False)


def test_garbage_shapes_in_ops():
    """The Python layer computes shapes before C checks them."""
    rng = random.Random(0)
    objects = anything()
    for _ in range(1500):
        x, q, a, n = rng.choice((X, torch.from_numpy(X))), rng.choice(objects), rng.choice(objects), rng.choice((N, K, 0, 10**30, None))
        for call in (lambda: ops.linear4bit(x, q, a, n), lambda: ops.linear8bitlt(x, q, a), lambda: ops.quantize_4bit(q),
                     lambda: ops.quantize_8bit(q), lambda: ops.dequantize_4bit(q, a, (N, K)), lambda: ops.dequantize_8bit(q, a)):
            try:
                call()
            except (*EXPECTED, AttributeError, OverflowError, NotImplementedError):
                pass
