"""The warpgroup kernel for 4-bit weights, run by the emulator, against the specification.

It is asked for by BNBQ_CUDA_WGMMA=1 and rounds each weight to 16 bits once, so its product is that with the
dequantised weight in x's dtype.
"""

import numpy as np
import pytest

import emulated_cuda as cuda
from bnbq import reference as ref
from cases import FORMATS, activations
from test_cuda_linear4 import Packed, explain, linear, rounded, to

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

# On both sides of 64 and 128 rows of x, 128 rows of W, steps of 64 columns, and of parts of k.
SHAPES = [(33, 1, 64), (64, 128, 64), (65, 129, 192), (128, 17, 320), (129, 40, 128), (257, 130, 64)]


@pytest.fixture(autouse=True)
def warpgroups(monkeypatch):
    monkeypatch.setenv("BNBQ_CUDA_WGMMA", "1")
    cuda.set_device()
    cuda.set_order(0)
    yield
    cuda.set_device()
    cuda.set_order(0)


def check(m, n, k, quant_type="nf4", blocksize=64, double=False, compute=cuda.BF16, bias=None):
    assert explain(m, n, k, blocksize, compute) == "wgmma"
    packed, x = Packed(n, k, quant_type, blocksize, double), to(activations(m, k), compute)
    y = linear(x, packed, bias, compute)
    w = ref.dequantize_4bit(packed.qweight, packed.absmax, (n, k), quant_type, blocksize)
    x, w = cuda.to_f32(x).astype("f8"), rounded(w, compute).astype("f8")
    want, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        want, size = want + bias, size + np.abs(bias)
    assert (np.abs(y - want) <= size * (k + 2) * 2.0**-24).all()
    return y


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("compute", [cuda.BF16, cuda.F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_shapes(m, n, k, compute, double):
    check(m, n, k, compute=compute, double=double, bias=np.linspace(-1, 1, n, dtype=np.float32))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
@pytest.mark.parametrize("quant_type", FORMATS)
def test_formats_and_blocks(quant_type, blocksize):
    check(40, 20, 1024, quant_type, blocksize, double=blocksize == 32)


@pytest.mark.parametrize("k", [32, 96, 160])
def test_the_last_step_may_be_half_a_step(k):
    check(40, 33, k, blocksize=32)


@pytest.mark.parametrize(("processors", "n", "launches"), [(1, 300, 2), (1, 20, 3), (132, 20, 3)])
def test_k_is_cut_into_parts_for_idle_processors(processors, n, launches):
    """Whole numbers: no order of additions changes a bit."""
    cuda.set_device(90, processors)
    m, k = 40, 2048
    w = np.random.default_rng(0).integers(-7, 8, (n, k)).astype(np.float32)
    w[:, ::64] = 7
    packed = Packed(n, k, "int4", 64, w=w)
    x = np.random.default_rng(1).integers(-3, 4, (m, k)).astype(np.float32)
    before = cuda.launches()
    y = linear(cuda.to_bf16(x), packed, compute=cuda.BF16)
    assert cuda.launches() - before == launches
    dense = cuda.to_f32(cuda.to_bf16(ref.dequantize_4bit(packed.qweight, packed.absmax, (n, k), "int4", 64)))
    assert np.array_equal(y, x @ dense.T)


@pytest.mark.parametrize(("m", "n", "k"), [(40, 130, 320), (130, 20, 192)])
def test_the_order_of_threads_changes_nothing(m, n, k):
    first = check(m, n, k)
    for order in (1, 2, 3):
        cuda.set_order(order)
        assert np.array_equal(check(m, n, k), first)


def test_what_is_not_finite_stays_in_its_row():
    packed, x = Packed(130, 96, blocksize=32), activations(70, 96)
    clean = linear(cuda.to_bf16(x), packed, compute=cuda.BF16)
    bits = cuda.to_bf16(x)
    bits[3, 5], bits[66, 90] = 0x7FC0, 0x7F80  # NaN, Inf
    y = linear(bits, packed, compute=cuda.BF16)
    rows = np.arange(70)
    assert not np.isfinite(y[[3, 66]]).any()
    assert np.array_equal(y[(rows != 3) & (rows != 66)], clean[(rows != 3) & (rows != 66)])


@pytest.mark.parametrize(("m", "capability", "invariant"), [(32, 90, False), (40, 80, False), (40, 100, False), (40, 90, True)])
def test_elsewhere_other_kernels_run(m, capability, invariant):
    assert explain(m, 64, 64, 64, cuda.BF16, invariant, capability) != "wgmma"


def test_it_has_to_be_asked_for(monkeypatch):
    monkeypatch.delenv("BNBQ_CUDA_WGMMA")
    assert explain(40, 64, 64, 64, cuda.BF16) != "wgmma"
