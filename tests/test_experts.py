"""Packed experts: the bytes, results and gradients of a layer per expert; those without tokens are not touched."""

import ctypes
import mmap
import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

import bnbq  # noqa: E402
import bnbq.ops_experts  # noqa: E402
from bnbq import nn  # noqa: E402
from bnbq.experts import Experts4bit, Experts8bit  # noqa: E402
from moe_models import linear  # noqa: E402

FORMATS = {
    "nf4": (Experts4bit, {}),
    "fp4 of 32": (Experts4bit, {"quant_type": "fp4", "blocksize": 32}),
    "int4 double": (Experts4bit, {"quant_type": "int4", "double_quant": True}),
    "nf4 a8": (Experts4bit, {"activations": "int8"}),
    "int8": (Experts8bit, {}),
    "int8 blocks": (Experts8bit, {"blocksize": 32, "threshold": 0.0}),
}
E, N, K = 5, 48, 128
ENDS = torch.tensor([3, 3, 4, 21, 21])  # rows 21 and 22 have no expert, experts 1 and 4 no row


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(k=K, dtype=torch.float32):
    return torch.randn(E, N, k, generator=torch.Generator().manual_seed(0)).to(dtype)



@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [K, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bytes_are_those_of_a_layer_per_expert(name, k, transposed):
    kind, settings = FORMATS[name]
    w = weights(k)
    packed = kind.from_weight(w.mT.contiguous() if transposed else w, transposed, **settings)
    for e in range(E):
        layer = kind.layer_class.from_linear(linear(w[e]), **settings)
        for leaf in layer.packed_spec():
            assert torch.equal(getattr(packed, leaf)[e], getattr(layer, leaf)), leaf
        dense = layer.dequantize()
        assert torch.equal(packed[e], dense.T if transposed else dense)
        assert torch.equal(packed.expert(e).dequantize(), dense)
        assert packed.expert(e).qweight.data_ptr() == packed.qweight[e].data_ptr()
    assert torch.equal(packed.dequantize(), torch.stack([packed[e] for e in range(E)]))
    assert torch.equal(packed[torch.tensor([4, 1, 4])], packed.dequantize()[[4, 1, 4]])
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16 and packed.dequantize().shape == packed.weight_shape


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [K, 100])
def test_results_and_gradients_are_those_of_a_loop_over_layers(name, dtype, k):
    kind, settings = FORMATS[name]
    w, bias = weights(k, dtype), torch.randn(E, N).to(dtype).requires_grad_()
    packed = kind.from_weight(w, **settings)
    x = (3 * torch.randn(23, k)).to(dtype).requires_grad_()
    y = packed(x, ENDS, bias)
    gy = torch.randn(y.shape).to(dtype)
    y.backward(gy)
    assert torch.equal(packed(x.detach(), ENDS, bias), y) and y.dtype == dtype
    start = 0
    for e, stop in enumerate(ENDS.tolist()):
        layer = kind.layer_class.from_linear(linear(w[e], bias[e].detach()), **settings)
        rows = x[start:stop].detach().requires_grad_()
        if stop > start:
            expected = layer(rows)
            expected.backward(gy[start:stop])
            assert torch.equal(y[start:stop], expected) and torch.equal(x.grad[start:stop], rows.grad)
            assert torch.allclose(bias.grad[e], layer.bias.grad, rtol=1e-2)
        else:
            assert not bias.grad[e].any()
        start = stop
    assert not y[start:].any() and not x.grad[start:].any()
    assert torch.equal(packed(x, ENDS), packed(x, ENDS, torch.zeros_like(bias)))


@pytest.mark.parametrize("name", FORMATS)
def test_threads_and_instruction_sets_change_nothing(name, isa, threads):
    """Experts are shared out to threads, or each is cut for all of them: the bits are those of a layer on one."""
    kind, settings = FORMATS[name]
    packed = kind.from_weight(torch.randn(6, 256, 512), **settings)
    for rows in ([4] * 6, [2, 0, 70, 1, 0, 3], [0, 0, 0, 9, 0, 0], [40, 41, 42, 43, 44, 45]):
        ends = torch.tensor(rows).cumsum(0)
        x = torch.randn(sum(rows), 512)
        gy = torch.randn(sum(rows), 256)
        y, gx = differentiate(packed, x, gy, ends)
        bnbq.ops.set_thread_limit(1)
        parts = zip(x.split(rows), gy.split(rows), range(6), strict=True)
        alone = [differentiate(packed.expert(e), one, g) for one, g, e in parts if len(one)]
        bnbq.ops.set_thread_limit(threads)
        assert torch.equal(y, torch.cat([a for a, _ in alone])) and torch.equal(gx, torch.cat([b for _, b in alone]))


@pytest.mark.parametrize("name", FORMATS)
def test_one_by_one_as_on_a_gpu(name, monkeypatch):
    """Where there is no kernel for all experts the product with one weight serves, to the same bits."""
    kind, settings = FORMATS[name]
    packed, bias = kind.from_weight(weights(), **settings), torch.randn(E, N)
    x, gy = torch.randn(23, K), torch.randn(23, N)
    expected = differentiate(packed, x, gy, ENDS, bias)
    monkeypatch.setattr(bnbq.ops_experts, "on_gpu", lambda tensor: True)
    for got, wanted in zip(differentiate(packed, x, gy, ENDS, bias), expected, strict=True):
        assert torch.equal(got, wanted)
    assert packed(x[:0], torch.zeros(E, dtype=torch.int64)).shape == (0, N)


def differentiate(module, x, gy, *arguments):
    x = x.clone().requires_grad_()
    y = module(x, *arguments)
    y.backward(gy)
    return y.detach(), x.grad


def test_empty_batches_and_other_routings():
    packed = Experts4bit.from_weight(weights())
    assert packed(torch.randn(0, K), torch.zeros(E, dtype=torch.int64)).shape == (0, N)
    x = torch.randn(4, K)
    assert torch.equal(packed(x, torch.tensor([0, 0, 0, 0, 4])), packed.expert(4)(x))
    assert not packed(x, torch.zeros(E, dtype=torch.int64)).any()


def test_compute_dtype_and_autocast_are_the_layers():
    w, x, ends = weights(), torch.randn(4, K), torch.tensor([4, 4, 4, 4, 4])
    for kind in (Experts4bit, Experts8bit):
        packed = kind.from_weight(w, compute_dtype="bfloat16")
        layer = kind.layer_class.from_linear(linear(w[0]), compute_dtype="bfloat16")
        assert torch.equal(packed(x, ends), layer(x))
        assert bnbq.set_compute_dtype(torch.nn.ModuleList([packed]), None) == 1 and packed.compute_dtype is None
        with torch.autocast("cpu", torch.bfloat16):
            layer.compute_dtype = None
            assert packed(x, ends).dtype == torch.bfloat16 and torch.equal(packed(x, ends), layer(x))
    packed = Experts4bit.from_weight(w)
    assert bnbq.set_activations(torch.nn.ModuleList([packed]), "int8") == 1
    assert torch.equal(packed(x, ends), nn.Linear4bit.from_linear(linear(w[0]), activations="int8")(x))


def test_compiled_whole_with_and_without_gradients():
    torch.compiler.reset()
    for kind in (Experts4bit, Experts8bit):
        packed, bias = kind.from_weight(weights()), torch.randn(E, N)
        run = torch.compile(lambda x, ends, p=packed, b=bias: p(x, ends, b), fullgraph=True, backend="aot_eager")
        x = torch.randn(23, K)
        with torch.no_grad():
            assert torch.equal(run(x, ENDS), packed(x, ENDS, bias))
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        run(one, ENDS).square().sum().backward()
        packed(other, ENDS, bias).square().sum().backward()
        assert torch.equal(one.grad, other.grad)


UNTOUCHED = """
    import ctypes, mmap, torch
    from bnbq.experts import Experts4bit
    E, n, k, page = 4, 128, 512, mmap.PAGESIZE
    experts = Experts4bit.from_weight(torch.randn(E, n, k))
    size = n * k // 2
    assert size % page == 0
    memory = mmap.mmap(-1, E * size)
    shared = torch.frombuffer(memory, dtype=torch.uint8).view(E, n, k // 2)
    shared.copy_(experts.qweight)
    experts._parameters["qweight"] = torch.nn.Parameter(shared, requires_grad=False)
    libc = ctypes.CDLL(None, use_errno=True)
    for e in range(E):
        if e not in (1, 3):
            assert libc.mprotect(ctypes.c_void_p(shared[e].data_ptr()), size, 0) == 0
    x, ends = torch.randn(3, k), torch.tensor([0, 1, 1, 3])
    y = experts(x, ends)
    x.requires_grad_()
    experts(x, ends).sum().backward()
    print("untouched", flush=True)
    experts(x.detach(), torch.tensor([0, 1, 2, 3]))
    print("not reached")
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect") or mmap.PAGESIZE > 32768, reason="needs mprotect")
def test_experts_without_tokens_are_not_touched():
    """Their bytes cannot be read: a forward and a backward that route around them work, one through them dies."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(UNTOUCHED)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "untouched\n" and done.returncode < 0, done


def test_bad_input_is_named():
    packed = Experts4bit.from_weight(weights())
    bad = weights()
    bad[3, 7, 9] = float("nan")
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    with pytest.raises(ValueError, match=r"expert 3: .*nan at index \(7, 9\)"):
        packed.quantize_(bad)
    with pytest.raises(ValueError, match=r"shape \[5, 128, 48\], expected \[5, 48, 128\]"):
        packed.quantize_(weights().mT)
    with pytest.raises(TypeError, match="int64"):
        packed.quantize_(torch.zeros(E, N, K, dtype=torch.int64))
    with pytest.raises(TypeError, match="3 dimensions"):
        Experts4bit.from_weight(torch.randn(4, 4))
    for arguments, error in (((0, 4, 4), ValueError), ((2.0, 4, 4), TypeError), ((2, -1, 4), ValueError)):
        with pytest.raises(error):
            Experts4bit(*arguments)
    with pytest.raises(ValueError, match="blocksize"):
        Experts4bit(2, 64, 64, blocksize=48)
    with pytest.raises(IndexError, match="no expert 5"):
        packed[5]
    with pytest.raises(TypeError, match="index"):
        packed[torch.zeros(2, 2, dtype=torch.int64)]
    with pytest.raises(ValueError, match="columns"):
        packed(torch.randn(23, K + 2), ENDS)
    with pytest.raises(ValueError, match=r"bias has shape \(5, 47\), wanted \(5, 48\)"):
        packed(torch.randn(23, K), ENDS, torch.zeros(E, N - 1))
    with pytest.raises(ValueError, match=r"x has shape \(23, 2, 128\), wanted \(rows, columns\)"):
        packed(torch.randn(23, 2, K), ENDS)
    with pytest.raises(ValueError, match="wanted 4 experts of"):
        packed(torch.randn(4, K), torch.tensor([1, 2, 3, 4]))
    with pytest.raises(TypeError, match="an end is 1.0"):
        packed(torch.randn(4, K), torch.tensor([1.0, 2, 3, 4, 4]))
    for ends in ([0, 3, 2, 4, 4], [0, 0, 0, 0, 5], [-1, 0, 0, 0, 4]):
        with pytest.raises(ValueError, match="ends"):
            packed(torch.randn(4, K), torch.tensor(ends))
    with pytest.raises(AttributeError, match="set_experts_implementation"):
        packed.transpose(1, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())


def test_a_state_dict_of_another_format_is_refused():
    state = Experts4bit.from_weight(weights()).state_dict()
    with pytest.raises(RuntimeError, match="quant_type='nf4'"):
        Experts4bit(E, K, N, quant_type="fp4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="qweight"):
        Experts4bit(E + 1, K, N).load_state_dict(state)
    packed = Experts4bit(E, K, N)
    packed.load_state_dict(state)
    assert torch.equal(packed.dequantize(), Experts4bit.from_weight(weights()).dequantize())
