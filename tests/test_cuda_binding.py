"""CUDA tensors from Python to the kernels and back, on a build that emulates the kernels (fake_cuda.py)."""

import ctypes
import gc
import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bnbq import _bnbq as built
from bnbq import doctor, doctor_cuda, nn, ops, ops_library, ops_torch
from cases import activations, weight
from fake_cuda import CUDA, Emulator, FakeCuda, load, why_not

report = importlib.import_module("bnbq.report")  # bnbq.report is a function

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10"),
]

M, N, K = 3, 40, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = list(zip(DTYPES, (2e-6, 2e-2, 2e-3), strict=True))


def tensors(**arrays):
    return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def inputs():
    """Fresh tensors of a layer, which lie on cuda:0 as far as the extension is concerned."""
    q4, a4, s2, offset = ops.quantize_4bit(weight(N, K), double_quant=True)
    q8, a8 = ops.quantize_8bit(weight(N, K))
    plain = ops.quantize_4bit(weight(N, K))
    return tensors(x=activations(M, K), w=weight(N, K), gy=activations(M, N), bias=activations(1, N)[0], q=plain.qweight,
                   a=plain.absmax, a4=a4, s2=s2, offset=offset, q8=q8, a8=a8)


@pytest.fixture(scope="module")
def emulated():
    """(module, fake): torch's own table is back in its place once the module has seen the fake one."""
    fake, module, own = FakeCuda(), load(), torch.Tensor.__dlpack_c_exchange_api__
    torch.Tensor.__dlpack_c_exchange_api__ = fake.capsule
    try:
        t = inputs()
        module.dequantize_4bit(t.q, t.a, None, None, torch.empty(N, K), "nf4", 64)
    finally:
        torch.Tensor.__dlpack_c_exchange_api__ = own
    return module, fake


@pytest.fixture
def cuda(emulated):
    """The module; what the fake and the emulator have counted starts anew, and nothing is left at the end."""
    module, fake = emulated
    fake.allocations.clear(), fake.streams.clear(), fake.places.clear()
    fake.fail_allocation = None
    yield SimpleNamespace(core=module, fake=fake, emulator=Emulator())
    module.set_batch_invariant(False)
    if fake.alive:
        gc.collect()  # an exception's traceback may hold results
    assert fake.alive == 0, "memory that nobody gave back"


@pytest.fixture
def python_layer(cuda, monkeypatch):
    """bnbq.ops and bnbq.nn on the emulated GPU."""
    for module in (ops, ops_torch, ops_library, report):
        monkeypatch.setattr(module, "_bnbq", cuda.core)
    monkeypatch.setattr(ops_library, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return cuda


def linear4bit(core, t, out=N, **other):
    t = SimpleNamespace(**{**vars(t), **other})
    return core.linear4bit(t.x, t.q, t.a, None, None, t.bias, out, "nf4", 64, None, None)


def linear8bitlt(core, t, out=None, **other):
    t = SimpleNamespace(**{**vars(t), **other})
    return core.linear8bitlt(t.x, t.q8, t.a8, t.bias, out, 6.0, 0)


def calls(core, t):
    """Each operation of the binding: name -> function and the tensors that it writes."""
    q, a, dense = torch.empty_like(t.q), torch.empty_like(t.a), torch.empty(N, K)
    codes, s2, offset = torch.empty_like(t.a4), torch.empty_like(t.s2), torch.empty(1)
    q8, a8 = torch.empty_like(t.q8), torch.empty_like(t.a8)
    y = torch.empty(M, N)
    return {
        "quantize_4bit": (lambda: core.quantize_4bit(t.w, q, a, "nf4", 64), (q, a)),
        "dequantize_4bit": (lambda: core.dequantize_4bit(t.q, t.a4, t.s2, t.offset, dense, "nf4", 64), (dense,)),
        "quantize_absmax": (lambda: core.quantize_absmax(t.a, codes, s2, offset), (codes, s2, offset)),
        "dequantize_absmax": (lambda: core.dequantize_absmax(t.a4, t.s2, t.offset, a), (a,)),
        "quantize_8bit": (lambda: core.quantize_8bit(t.w, q8, a8, 0), (q8, a8)),
        "dequantize_8bit": (lambda: core.dequantize_8bit(t.q8, t.a8, dense, 0), (dense,)),
        "linear4bit": (lambda: linear4bit(core, t, y), (y,)),
        "linear8bitlt": (lambda: linear8bitlt(core, t, y), (y,)),
    }


NAMES = list(calls(None, inputs()))


# ------------------------------------------------------------------ what runs, and where


def test_every_operation_is_right(python_layer):
    """The doctor's comparison of each operation with the CPU, at sizes that an emulation can do."""
    results = doctor_cuda.self_test("cpu", rows=(1, 5, 33), shapes=((24, 128),))
    assert [r["operation"] for r in results if not r["ok"]] == [], results
    assert len(results) == len(doctor_cuda.CHECKS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_launches_go_to_the_stream_of_the_tensors(cuda, name, device):
    t = inputs()
    call, outputs = calls(cuda.core, t)[name]
    for tensor in (*vars(t).values(), *outputs):
        cuda.fake.place(tensor, device)
    before = cuda.emulator.launches
    call()
    index = int(device[-1])
    assert cuda.emulator.launches > before
    assert cuda.fake.streams == [(CUDA, index)]
    assert cuda.emulator.last_call() == (index, FakeCuda.STREAM + index, False)
    assert {where for where, _ in cuda.fake.allocations} <= {(CUDA, index)}


def test_batch_invariance_is_passed_on(cuda):
    cuda.core.set_batch_invariant(True)
    linear4bit(cuda.core, inputs())
    assert cuda.emulator.last_call()[2] is True


@pytest.mark.parametrize("linear", [linear4bit, linear8bitlt])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0), (5, 1, 2)], ids=str)
def test_results_come_from_torchs_allocator(cuda, linear, dtype, lead):
    t = inputs()
    x = torch.from_numpy(activations(int(np.prod(lead)), K).reshape(*lead, K)).to(dtype)
    y = linear(cuda.core, t, x=x)
    assert (type(y), y.shape, y.dtype, y.is_contiguous()) == (torch.Tensor, (*lead, N), dtype, True)
    assert cuda.fake.allocations[0] == ((CUDA, 0), y.numel() * dtype.itemsize)
    assert cuda.fake.alive == 1 and (y.numel() == 0 or not y.isnan().any())
    view = y[..., 1:]
    del y
    assert cuda.fake.alive == 1
    del view
    assert cuda.fake.alive == 0


@pytest.mark.parametrize("linear", [linear4bit, linear8bitlt])
def test_working_space_comes_from_torch_and_goes_back_at_once(cuda, linear):
    t = inputs()
    strided = torch.zeros(K, M).T  # a copy is needed
    strided.copy_(t.x)
    y, plain = torch.empty(M, N), torch.empty(M, N)
    linear(cuda.core, t, plain)
    cuda.fake.allocations.clear()
    linear(cuda.core, t, y, x=strided)
    assert len(cuda.fake.allocations) > 0 and cuda.fake.alive == 0
    assert torch.equal(y, plain)


def test_empty_tensors_need_no_gpu(cuda):
    t = inputs()
    before = cuda.emulator.launches
    assert linear4bit(cuda.core, t, x=torch.empty(0, K)).shape == (0, N)
    assert linear8bitlt(cuda.core, t, x=torch.empty(2, 0, K)).shape == (2, 0, N)
    cuda.core.quantize_4bit(torch.empty(0, K), torch.empty(0, K // 2, dtype=torch.uint8), torch.empty(0, 2), "nf4", 64)
    assert cuda.emulator.launches == before


# ------------------------------------------------------------------ what fails


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_launch_is_an_exception_with_shapes(cuda, name):
    t = inputs()
    call, _ = calls(cuda.core, t)[name]
    cuda.emulator.fail_next_launch(b"out of patience (cudaErrorPatience)")
    with pytest.raises(RuntimeError) as error:
        call()
    assert re.fullmatch(rf"{name} on cuda:0, \w+ \(.*\): out of patience \(cudaErrorPatience\)", str(error.value)), error.value
    if name.startswith("linear"):
        assert f"x ({M}, {K}), weight ({N}, {K})" in str(error.value)
    call()  # and the next one is as if nothing had been


def test_a_failed_launch_frees_the_result_and_the_working_space(cuda):
    strided = torch.zeros(K, M).T
    for linear in (linear4bit, linear8bitlt):
        cuda.emulator.fail_next_launch(b"no")
        with pytest.raises(RuntimeError, match=": no"):
            linear(cuda.core, inputs(), x=strided)
        assert cuda.fake.alive == 0


@pytest.mark.parametrize("linear", [linear4bit, linear8bitlt])
def test_no_memory_is_an_exception(cuda, linear):
    strided = torch.zeros(K, M).T
    linear(cuda.core, inputs(), x=strided)
    allocations, messages = len(cuda.fake.allocations), []
    for turn in range(allocations):
        cuda.fake.allocations.clear()
        cuda.fake.fail_allocation = turn
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory. Tried") as error:
            linear(cuda.core, inputs(), x=strided)
        assert cuda.fake.alive == 0
        messages.append(str(error.value))
    assert "out cannot be allocated" in messages[0] and "no memory for working space" in messages[1]


class Producer:
    """Speaks DLPack, and says that it is on a GPU."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return CUDA, 0

    def __dlpack__(self, **keywords):
        raise AssertionError("nobody may ask for its memory")


class ExchangeProducer:
    """A table of its own, which gives the tensor's memory."""


def test_only_torch_tensors_on_a_gpu(cuda):
    t, before = inputs(), cuda.emulator.launches
    with pytest.raises(RuntimeError, match=r"linear4bit: x is a Producer, on a GPU wanted a torch.Tensor"):
        linear4bit(cuda.core, t, x=Producer(t.x))
    with pytest.raises(RuntimeError, match=r"linear4bit: qweight is a Producer, on a GPU wanted a torch.Tensor"):
        linear4bit(cuda.core, t, q=Producer(t.q))
    other = FakeCuda()
    other.borrow = lambda object, out: cuda.fake.borrow(id(t.x), out)
    ExchangeProducer.__dlpack_c_exchange_api__ = FakeCuda.__init__(other) or other.capsule
    with pytest.raises(RuntimeError, match="x is a ExchangeProducer, on a GPU wanted a torch.Tensor"):
        linear4bit(cuda.core, t, x=ExchangeProducer())
    assert cuda.emulator.launches == before


@pytest.mark.parametrize("name, device, message", [
    ("q", "cuda:1", "x is on cuda:0 and qweight on cuda:1, wanted all on one device"),
    ("bias", "cuda:1", "x is on cuda:0 and bias on cuda:1, wanted all on one device"),
    ("a", "cpu", "x is on cuda:0 and absmax on the CPU, wanted all on one device"),
    ("x", "cpu", "x is on the CPU and qweight on cuda:0, wanted all on one device"),
    ("x", "cuda:1", "x is on cuda:1 and qweight on cuda:0, wanted all on one device"),
])
def test_tensors_on_several_devices(cuda, name, device, message):
    t, before = inputs(), cuda.emulator.launches
    cuda.fake.place(getattr(t, name), device)
    with pytest.raises(RuntimeError, match=f"^linear4bit: {message}$"):
        linear4bit(cuda.core, t)
    assert cuda.emulator.launches == before and not cuda.fake.streams


def test_arrays_beside_cuda_tensors(cuda):
    t = inputs()
    with pytest.raises(RuntimeError, match="x is on cuda:0 and qweight on the CPU, wanted all on one device"):
        linear4bit(cuda.core, t, q=t.q.numpy())
    out = cuda.fake.place(torch.empty(M, N), "cpu")
    with pytest.raises(RuntimeError, match="x is on cuda:0 and out on the CPU, wanted all on one device"):
        linear4bit(cuda.core, t, out)


def test_arrays_still_run_on_the_cpu(cuda):
    t, before = inputs(), cuda.emulator.launches
    arrays = SimpleNamespace(**{name: tensor.numpy() for name, tensor in vars(t).items()})
    y = linear4bit(cuda.core, arrays)
    assert np.array_equal(y, linear4bit(built, arrays)) and cuda.emulator.launches == before


def test_nothing_runs_when_an_argument_is_bad(cuda):
    t, before = inputs(), cuda.emulator.launches
    y = torch.full((M, N), 7.0)
    bad = [
        lambda: linear4bit(cuda.core, t, y, x=t.x.double()),
        lambda: linear4bit(cuda.core, t, y, x=t.x[:, :64]),
        lambda: linear4bit(cuda.core, t, y, q=t.q[:, ::2]),
        lambda: linear4bit(cuda.core, t, y, a=t.a[:5]),
        lambda: linear4bit(cuda.core, t, y, bias=t.bias[:5]),
        lambda: linear4bit(cuda.core, t, y[:2]),
        lambda: linear4bit(cuda.core, t, y, x=y),
        lambda: linear8bitlt(cuda.core, t, y, q8=t.q),
        lambda: linear8bitlt(cuda.core, t, y, x=t.x[:, :64]),
        lambda: linear8bitlt(cuda.core, t, y, a8=t.a8[:1]),
        lambda: cuda.core.linear8bitlt(t.x, t.q8, t.a8, None, y, -1.0, 0),
        lambda: cuda.core.quantize_4bit(t.w, t.q[:5], t.a, "nf4", 64),
        lambda: cuda.core.quantize_4bit(t.w, t.q, t.a, "nf3", 64),
        lambda: cuda.core.quantize_8bit(t.w[:5], t.q8, t.a8, 0),
        lambda: cuda.core.dequantize_4bit(t.q, t.a4, t.s2, None, t.w, "nf4", 64),
        lambda: cuda.core.dequantize_8bit(t.q8, t.a8, t.w[:5], 0),
        lambda: cuda.core.quantize_absmax(t.a, t.a4[:5], t.s2, t.offset),
        lambda: cuda.core.dequantize_absmax(t.a4, t.s2[:0], t.offset, t.a),
    ]
    for call in bad:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert cuda.emulator.launches == before and not cuda.fake.allocations and bool((y == 7).all())


@pytest.mark.parametrize("name", ["linear4bit_backward", "linear8bitlt_backward"])
def test_the_binding_has_no_backward_on_a_gpu(cuda, name):
    t = inputs()
    arguments = (t.q, t.a, None, None, K, "nf4", 64, None) if "4" in name else (t.q8, t.a8, None, 0)
    message = rf"{name} on cuda:0, gy \({M}, {N}\), weight \({N}, {K}\): a GPU has no kernel for this; bnbq.ops"
    with pytest.raises(RuntimeError, match=message):
        getattr(cuda.core, name)(t.gy, *arguments)


# ------------------------------------------------------------------ the Python layer


def close(got, wanted, bound):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert (got.double() - wanted.double()).abs().max() <= bound * wanted.double().abs().max()


@pytest.mark.parametrize("dtype, bound", BOUNDS, ids=str)
def test_many_rows_are_dequantised_and_multiplied_by_torch(python_layer, monkeypatch, dtype, bound):
    monkeypatch.setattr(ops_library, "DENSE_ROWS", 64)
    t, dense = inputs(), []
    multiply = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: (dense.append(a[0].shape), multiply(*a))[1])

    def run(m, compute=None):
        dense.clear()
        x = torch.from_numpy(activations(m, K)).to(dtype).reshape(2, m // 2, K)
        y = ops_torch.differentiable("linear4bit", x, t.q, t.a, None, None, t.bias, N, "nf4", 64, compute, None)
        return y, x, len(dense)

    wanted = ops.dequantize_4bit(t.q, t.a, (N, K))
    for m, expected in ((62, 0), (64, 1), (100, 1)):
        y, x, used = run(m)
        assert used == expected, m
        close(y, (x.float() @ wanted.T + t.bias).to(dtype), bound)
    other = "float32" if dtype != torch.float32 else "bfloat16"
    assert run(64, other)[2] == 0  # the product's result would be rounded to it
    assert run(64, str(dtype).removeprefix("torch."))[2] == 1
    python_layer.core.set_batch_invariant(True)
    assert run(64)[2] == 0


def test_many_rows_are_checked_like_few(python_layer, monkeypatch):
    monkeypatch.setattr(ops_library, "DENSE_ROWS", 2)
    t, before = inputs(), python_layer.emulator.launches

    def linear(x=t.x, q=t.q, a=t.a, n=N, bias=t.bias, quant_type="nf4"):
        return ops_library.linear4bit(x, q, a, None, None, bias, n, quant_type, 64, None, None)

    for call, error, message in [
        (lambda: linear(x=t.x.double()), TypeError, "linear4bit: x is float64"),
        (lambda: linear(x=t.x[:, :64]), ValueError, "linear4bit: x has 64 columns, the weight has k = 128"),
        (lambda: linear(n=N + 1), ValueError, "linear4bit: out has 41 columns, the weight has n = 40"),
        (lambda: linear(bias=t.bias[:3]), ValueError, r"linear4bit: bias has shape \(3,\)"),
        (lambda: linear(quant_type="nf3"), ValueError, "linear4bit: quant_type is 'nf3'"),
    ]:
        with pytest.raises(error, match=message):
            call()
    for call, error, message in [
        (lambda: ops_library.linear4bit_backward(t.gy[:, 1:], t.q, t.a, None, None, K, "nf4", 64, None), ValueError,
         "linear4bit_backward: gy has 39 columns, the weight has n = 40"),
        (lambda: ops_library.linear4bit_backward(t.gy, t.q, t.a, None, None, K, "nf4", 64, "int8"), ValueError, "compute_dtype"),
        (lambda: ops_library.linear8bitlt_backward(t.gy.int(), t.q8, t.a8, 0), TypeError, "gy is int32"),
        (lambda: ops_library.linear8bitlt_backward(torch.tensor(1.0), t.q8, t.a8, 0), ValueError, "gy has 0 columns"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert python_layer.emulator.launches == before


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype, bound", BOUNDS, ids=str)
def test_gradients(python_layer, dtype, bound, double_quant):
    t, gy = inputs(), torch.from_numpy(activations(6, N)).reshape(2, 3, N).to(dtype)
    absmax, second = (t.a4, (t.s2, t.offset)) if double_quant else (t.a, (None, None))
    dense = ops.dequantize_4bit(t.q, absmax, (N, K), absmax2=second[0], absmax_offset=second[1])
    x = torch.from_numpy(activations(6, K)).reshape(2, 3, K).to(dtype).requires_grad_()
    bias = t.bias.clone().requires_grad_()
    y = ops.linear4bit(x, t.q, absmax, N, bias, absmax2=second[0], absmax_offset=second[1])
    assert not y.isnan().any()
    y.backward(gy)
    close(x.grad, (gy.float() @ dense).to(dtype), bound)
    close(bias.grad, gy.float().sum((0, 1)), 1e-6)
    x8 = x.detach().clone().requires_grad_()
    ops.linear8bitlt(x8, t.q8, t.a8).backward(gy)
    close(x8.grad, (gy.float() @ ops.dequantize_8bit(t.q8, t.a8)).to(dtype), bound)


@pytest.mark.parametrize("compute, bound", [("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 1e-2)])
def test_gradients_in_another_dtype_keep_their_range(python_layer, compute, bound):
    t = inputs()
    gy = t.gy * 1e4  # times the weights it is beyond float16
    gx = ops.linear4bit_backward(gy, t.q, t.a * 1e3, K, compute_dtype=compute)
    wanted = gy @ ops.dequantize_4bit(t.q, t.a * 1e3, (N, K))
    assert wanted.abs().max() > 65504
    close(gx, wanted, bound)


@pytest.mark.parametrize("many", [False, True])
def test_compiled_models_see_one_operator(python_layer, monkeypatch, many):
    """Whether a product goes on to cuBLAS is decided when it runs, not when it is traced."""
    monkeypatch.setattr(ops_library, "DENSE_ROWS", 1 if many else 1024)
    layer, x, seen = nn.Linear4bit(K, N), torch.from_numpy(activations(M, K)), []

    def backend(graph, example):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert seen == [[torch.ops.bnbq.linear4bit_autograd]]  # its bias is trained
    close(y.detach(), (x @ layer.dequantize().T + layer.bias).detach(), 1e-5)
    arguments = (x, layer.qweight, layer.absmax, None, None, layer.bias.detach(), N, "nf4", 64, None, None)
    torch.library.opcheck(torch.ops.bnbq.linear4bit.default, arguments)
    gy = torch.from_numpy(activations(M, N))
    torch.library.opcheck(torch.ops.bnbq.linear4bit_backward.default, (gy, *arguments[1:5], K, "nf4", 64, None))


def test_a_failed_launch_in_the_python_layer(python_layer):
    layer, x = nn.Linear4bit(K, N), torch.zeros(M, K)
    python_layer.emulator.fail_next_launch(b"device lost")
    with pytest.raises(RuntimeError, match=f"linear4bit on cuda:0, x .{M}, {K}., weight .{N}, {K}.: device lost"):
        ops_torch.differentiable("linear4bit", x, layer.qweight, layer.absmax, None, None, None, N, "nf4", 64, None, None)
    layer(x)


@pytest.mark.parametrize("make", [
    lambda w: nn.Linear4bit.from_linear(w), lambda w: nn.Linear4bit.from_linear(w, double_quant=True),
    lambda w: nn.Linear8bitLt.from_linear(w), lambda w: nn.Linear8bitLt.from_linear(w, blocksize=32),
])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_layers_look_for_weights_that_are_not_finite(python_layer, monkeypatch, make, value):
    dense = torch.nn.Linear(K, N)
    dense.weight.data.copy_(torch.from_numpy(weight(N, K)))
    make(dense)
    dense.weight.data[3, 17] = float(value)
    with pytest.raises(ValueError, match=rf"quantize_[48]bit: w has {value} at index \(3, 17\)"):
        make(dense)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    make(dense)  # while a graph is captured nobody may wait for the GPU


def test_operations_do_not_wait_to_see_whether_weights_are_finite(python_layer, monkeypatch):
    t = inputs()
    t.w[3, 17] = float("nan")
    for function in ("isfinite", "nonzero"):
        monkeypatch.setattr(torch, function, None)
    assert not np.isfinite(ops.quantize_4bit(t.w).absmax.numpy()).all()
    assert not np.isfinite(ops.quantize_4bit(t.w, double_quant=True).absmax_offset.numpy()).all()
    assert not np.isfinite(ops.quantize_8bit(t.w)[1].numpy()).all()


# ------------------------------------------------------------------ torch without the exchange API


def test_torch_without_the_exchange_api(cuda, monkeypatch):
    """Tensors come by to_dlpack, the stream from torch.cuda, memory from torch.empty: torch 2.4 to 2.9."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    export, empty, exported = torch.utils.dlpack.to_dlpack, torch.empty, []

    def to_dlpack(tensor):
        exported.append(tensor.shape)
        capsule = export(tensor)
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = CUDA
        return capsule

    def fake_empty(*sizes, device=None, **settings):
        spaces.append(device)
        if len(spaces) - 1 == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*sizes, **settings).fill_(0xFF)

    own, module, spaces, failing = torch.Tensor.__dlpack_c_exchange_api__, load(), [], None
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda self: (CUDA, 0))
    monkeypatch.setattr(torch.utils.dlpack, "to_dlpack", to_dlpack)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x7000 + device))
    monkeypatch.setattr(torch, "empty", fake_empty)
    t, strided = inputs(), torch.zeros(K, M).T
    strided.copy_(t.x)
    y = linear4bit(module, t, x=strided)
    assert cuda.emulator.last_call() == (0, 0x7000, False)
    assert len(exported) >= 5 and set(spaces) == {"cuda:0"} and y.shape == (M, N)
    failing, spaces = 0, []
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        linear4bit(module, t, x=strided)
    monkeypatch.undo()
    assert torch.Tensor.__dlpack_c_exchange_api__ is own
    close(y, linear4bit(cuda.core, t), 1e-6)


# ------------------------------------------------------------------ what people read


def layer_on(device, kind=nn.Linear4bit, **settings):
    layer = kind(K, N, device="meta", **settings)
    layer._hf_hook = SimpleNamespace(execution_device=device)
    return layer


def test_explain_on_a_gpu(python_layer):
    explanation = report.explain(layer_on("cuda:1"))
    assert explanation.kernel == "q4 cuda" and "cuda:1" in str(explanation) and "emulated" in str(explanation)
    assert "m = 1024" in str(explanation)
    assert report.explain(layer_on("cuda:1"), m=1023).kernel == "q4 cuda"
    assert report.explain(layer_on("cuda:1"), m=1024).kernel == "q4 cuda dequantise, then cuBLAS"
    assert report.explain(layer_on("cuda:1", compute_dtype="bfloat16"), m=1024).kernel == "q4 cuda"
    assert "changes nothing" in str(report.explain(layer_on("cuda:0", activations="int8")))
    assert report.explain(layer_on("cuda:0", nn.Linear8bitLt)).kernel == "s8 cuda"
    python_layer.core.set_batch_invariant(True)
    assert report.explain(layer_on("cuda:1"), m=1024).kernel == "q4 cuda"


@pytest.mark.skipif(bool(built.build_info()["cuda"]), reason="a build with CUDA")
def test_explain_without_kernels():
    assert report.explain(layer_on("cuda:0")).kernel == "none: this build of bnbq has no kernels for cuda:0"


def test_the_doctor_examines_each_gpu(python_layer, monkeypatch):
    rows, shapes = (1,), ((8, 64),)
    run = doctor_cuda.self_test
    monkeypatch.setattr(doctor_cuda, "self_test", lambda device: run("cpu", rows, shapes))
    facts = doctor.examine()
    assert facts["gpu_self_test"] == []  # torch sees none here
    facts["torch"]["gpus"] = ["one", "another"]
    facts["gpu_self_test"] = doctor.gpu_self_test(facts)
    assert len(facts["gpu_self_test"]) == 2 * len(doctor_cuda.CHECKS) and all(test["ok"] for test in facts["gpu_self_test"])
    text = doctor.describe({**facts, "build": python_layer.core.build_info()})
    assert "CUDA: toolkit emulated, emulated" in text and re.search(r"linear8bitlt_backward +ok", text)


@pytest.mark.parametrize("operation", doctor_cuda.CHECKS)
def test_the_doctor_notices_what_is_wrong(python_layer, monkeypatch, operation):
    """One result of the operation is off: the check of that operation fails."""
    right = getattr(ops, operation)

    def wrong(*arguments, **settings):
        result = right(*arguments, **settings)
        if isinstance(arguments[0], torch.Tensor):
            first = result[0] if isinstance(result, tuple) else result
            first.view(-1)[0] += 1
        return result

    monkeypatch.setattr(ops, operation, wrong)
    results = {r["operation"]: r for r in doctor_cuda.self_test("cpu", rows=(1,), shapes=((8, 64),))}
    assert not results[operation]["ok"] and results[operation]["error"].startswith("ArithmeticError")
