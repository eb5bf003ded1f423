"""bnbq.ops: the same results for NumPy and torch, and everything torch adds: gradients, autocast, tracing."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnbq import _bnbq, ops
from bnbq import reference as ref
from cases import activations, weight

N, K = 33, 128
KINDS = {"numpy": lambda a: a, "torch": lambda a: torch.from_numpy(a) if isinstance(a, np.ndarray) else a}
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def w():
    return weight(N, K)


@pytest.fixture
def packed4(w):
    """qweight, absmax and the weight they stand for, as torch tensors."""
    qweight, absmax = map(torch.from_numpy, ops.quantize_4bit(w)[:2])
    return qweight, absmax, ops.dequantize_4bit(qweight, absmax, (N, K))


@pytest.fixture
def packed8(w):
    qweight, absmax = map(torch.from_numpy, ops.quantize_8bit(w))
    return qweight, absmax, ops.dequantize_8bit(qweight, absmax)


@pytest.fixture(params=["4bit", "8bit"])
def layer(request, packed4, packed8):
    """(function of x and bias, its dense weight). Threshold 1e-30 makes the int8 layer a float product."""
    if request.param == "4bit":
        return lambda x, bias=None: ops.linear4bit(x, *packed4[:2], N, bias), packed4[2]
    return lambda x, bias=None: ops.linear8bitlt(x, *packed8[:2], bias, threshold=1e-30), packed8[2]


def near(got, want, dtype=torch.float32):
    scale = want.abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got, want.to(got.dtype), rtol=DTYPES[dtype] * 8, atol=DTYPES[dtype] * scale)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("shape, qweight, absmax", [
    ((4, 128), (4, 64), (4, 2)),
    ((2, 3, 64), (2, 3, 32), (2, 3, 1)),
    ((5, 100), (250,), (8,)),
    ((3, 5), (8,), (1,)),
    ((64,), (32,), (1,)),
    ((0, 64), (0, 32), (0, 1)),
])
def test_packed_shapes(kind, shape, qweight, absmax):
    packed = ops.quantize_4bit(kind(np.ones(shape, np.float32)), double_quant=True)
    assert (tuple(packed.qweight.shape), tuple(packed.absmax.shape)) == (qweight, absmax)
    assert tuple(packed.absmax2.shape) == (-(-int(np.prod(absmax)) // 256),) and tuple(packed.absmax_offset.shape) == (1,)
    dense = ops.dequantize_4bit(packed.qweight, packed.absmax, shape, absmax2=packed.absmax2,
                                absmax_offset=packed.absmax_offset)
    assert tuple(dense.shape) == shape and bool((dense == 1).all())


@pytest.mark.parametrize("quant_type", ref.FORMATS)
def test_4bit_round_trip_is_the_specification(kind, w, quant_type):
    packed = ops.quantize_4bit(kind(w), quant_type, 32)
    codes, absmax = ref.quantize_4bit(w, quant_type, 32)
    assert type(packed.qweight) is type(kind(w)) and packed.absmax2 is None
    assert np.array_equal(np.asarray(packed.qweight).ravel(), codes)
    dense = ops.dequantize_4bit(*packed[:2], w.shape, quant_type=quant_type, blocksize=32)
    assert np.array_equal(np.asarray(dense), ref.dequantize_4bit(codes, absmax, w.shape, quant_type, 32))


def test_double_quantisation_is_the_specification(kind, w):
    packed = ops.quantize_4bit(kind(w), double_quant=True)
    wanted = ref.quantize_absmax(ref.quantize_4bit(w)[1])
    for got, want in zip(packed[1:], wanted, strict=True):
        assert np.array_equal(np.asarray(got).ravel(), want)
    scales = ops.dequantize_absmax(*packed[1:])
    assert scales.shape == packed.absmax.shape
    assert np.array_equal(np.asarray(scales).ravel(), ref.dequantize_absmax(*wanted))


@pytest.mark.parametrize("blocksize", [0, 32, 4096])
def test_8bit_round_trip_is_the_specification(kind, w, blocksize):
    qweight, absmax = ops.quantize_8bit(kind(w), blocksize)
    wanted = ref.quantize_8bit(w, blocksize)
    assert np.array_equal(np.asarray(qweight), wanted[0]) and np.array_equal(np.asarray(absmax), wanted[1])
    dense = ops.dequantize_8bit(qweight, absmax, blocksize=blocksize)
    assert np.array_equal(np.asarray(dense), ref.dequantize_8bit(*wanted, blocksize))


def test_dequantize_rounds_to_the_dtype_asked_for(packed4, packed8):
    for dtype in DTYPES:
        assert torch.equal(ops.dequantize_4bit(*packed4[:2], (N, K), dtype=dtype), packed4[2].to(dtype))
        assert torch.equal(ops.dequantize_8bit(*packed8[:2], dtype=dtype), packed8[2].to(dtype))
    half = ops.dequantize_4bit(packed4[0].numpy(), packed4[1].numpy(), (N, K), dtype=np.float16)
    assert np.array_equal(half, packed4[2].half().numpy())


def test_quantising_a_parameter_gives_tensors_without_history(w):
    parameter = torch.nn.Parameter(torch.from_numpy(w))
    for tensor in (*ops.quantize_4bit(parameter, double_quant=True), *ops.quantize_8bit(parameter)):
        assert type(tensor) is torch.Tensor and not tensor.requires_grad


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0,)], ids=str)
def test_empty_weights(kind, shape):
    w = kind(np.ones(shape, np.float32))
    packed = ops.quantize_4bit(w, double_quant=True)
    assert packed.qweight.shape[-1] == shape[-1] // 2 or len(packed.qweight.shape) == 1
    assert tuple(ops.dequantize_absmax(*packed[1:]).shape) == tuple(packed.absmax.shape)
    if len(shape) == 2:
        assert tuple(ops.dequantize_4bit(*ops.quantize_4bit(w)[:2], shape).shape) == shape
        for blocksize in (0, 64):
            packed8 = ops.quantize_8bit(w, blocksize)
            assert tuple(ops.dequantize_8bit(*packed8, blocksize=blocksize).shape) == shape


@pytest.mark.parametrize("n, k", [(0, 64), (3, 0), (0, 0)])
def test_linear_with_empty_weights(kind, n, k):
    """Without columns the product is zero and the bias remains."""
    w, x = kind(np.ones((n, k), np.float32)), kind(np.ones((2, k), np.float32))
    bias, gy = kind(np.arange(n, dtype=np.float32)), kind(np.ones((2, n), np.float32))
    packed4, packed8 = ops.quantize_4bit(w)[:2], ops.quantize_8bit(w)
    for y in (ops.linear4bit(x, *packed4, n, bias), ops.linear8bitlt(x, *packed8, bias)):
        assert np.array_equal(np.asarray(y), np.broadcast_to(np.arange(n), (2, n)))
    for gx in (ops.linear4bit_backward(gy, *packed4, k), ops.linear8bitlt_backward(gy, *packed8)):
        assert np.array_equal(np.asarray(gx), np.zeros((2, k)))


# ------------------------------------------------------------------ forward


def test_numpy_and_torch_agree_bit_for_bit(packed4, packed8):
    x, bias = activations(7, K, outliers=2), activations(1, N)[0]
    for function, packed in ((ops.linear4bit, (*packed4[:2], N)), (ops.linear8bitlt, packed8[:2])):
        a = function(torch.from_numpy(x), *packed, torch.from_numpy(bias))
        b = function(x, *[p.numpy() if isinstance(p, torch.Tensor) else p for p in packed], bias)
        assert type(a) is torch.Tensor and type(b) is np.ndarray and np.array_equal(a.numpy(), b)


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (2, 0, K), (1,) * 9 + (4, K)], ids=str)
def test_leading_dimensions_are_kept(layer, shape):
    function, dense = layer
    x = torch.randn(shape)
    y = function(x)
    assert y.shape == (*shape[:-1], N)
    near(y, F.linear(x, dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
def test_output_has_the_dtype_of_x(layer, dtype, bias_dtype):
    function, dense = layer
    x = torch.randn(5, K).to(dtype)
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    y = function(x, bias)
    assert y.dtype == dtype
    near(y, F.linear(x.float(), dense, None if bias is None else bias.float()), dtype)


def test_compute_dtype_rounds_x_and_nothing_else(packed4):
    x = torch.randn(3, K)
    for dtype in DTYPES:
        y = ops.linear4bit(x, *packed4[:2], N, compute_dtype=dtype)
        assert y.dtype == torch.float32
        assert torch.equal(y, ops.linear4bit(x, *packed4[:2], N, compute_dtype=str(dtype)[6:]))
        near(y, F.linear(x.to(dtype).float(), packed4[2]), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_double_quantised_layer_equals_the_layer_with_decoded_scales(w):
    packed = ops.quantize_4bit(torch.from_numpy(w), double_quant=True)
    scales = ops.dequantize_absmax(*packed[1:])
    x = torch.randn(4, K)
    nested = {"absmax2": packed.absmax2, "absmax_offset": packed.absmax_offset}
    assert torch.equal(ops.linear4bit(x, *packed[:2], N, **nested), ops.linear4bit(x, packed.qweight, scales, N))
    gy = torch.randn(4, N)
    assert torch.equal(ops.linear4bit_backward(gy, *packed[:2], K, **nested),
                       ops.linear4bit_backward(gy, packed.qweight, scales, K))


def test_column_vector_of_bitsandbytes_is_accepted(packed4):
    x = torch.randn(2, K)
    flat = ops.linear4bit(x, packed4[0].reshape(-1, 1), packed4[1].reshape(-1), N)
    assert torch.equal(flat, ops.linear4bit(x, *packed4[:2], N))


def test_threads_may_call_at_once(packed4):
    x = torch.randn(40, K)
    want, wrong = ops.linear4bit(x, *packed4[:2], N), []

    def work():
        for _ in range(50):
            if not torch.equal(ops.linear4bit(x, *packed4[:2], N), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_long_calls_release_the_gil():
    w = np.ones((2048, 2048), np.float32)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.0002):
            ticks.append(running[0])

    running = [False]
    ticker = threading.Thread(target=tick)
    ticker.start()
    for _ in range(20):  # each long enough for a tick, and one is all it takes
        qweight, absmax = np.empty(w.size // 2, np.uint8), np.empty(w.size // 64, np.float32)
        running[0] = True
        _bnbq.quantize_4bit(w, qweight, absmax, "nf4", 64)
        running[0] = False
    stop.set()
    ticker.join()
    assert any(ticks)


# ------------------------------------------------------------------ int8 activations


def test_int8_activations_of_arrays_and_tensors(packed4):
    x = activations(5, K)
    y = ops.linear4bit(torch.from_numpy(x), *packed4[:2], N, activations="int8")
    assert np.array_equal(y.numpy(), ops.linear4bit(x, *[p.numpy() for p in packed4[:2]], N, activations="int8"))
    error = (y - F.linear(torch.from_numpy(x), packed4[2])).norm() / y.norm()
    assert 1e-3 < error < 3e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_with_int8_activations_are_those_without(packed4, compiled, dynamo):
    def function(x, bias, activations):
        return ops.linear4bit(x, *packed4[:2], N, bias, activations=activations)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, gy = torch.randn(6, K), torch.randn(6, N)
    outputs, gradients = [], []
    for kind in ("int8", None):
        inputs = x.clone().requires_grad_(), torch.zeros(N, requires_grad=True)
        y = function(*inputs, kind)
        first = torch.autograd.grad(y, inputs, gy, create_graph=not compiled)
        outputs.append(y.detach())
        gradients.append([g.detach() for g in first])
    assert not torch.equal(*outputs)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(outputs[0], ops.linear4bit(x, *packed4[:2], N, torch.zeros(N), activations="int8"))


def test_second_derivative_is_a_float_product_with_int8_activations(packed4):
    x, gy = torch.randn(3, K, requires_grad=True), torch.randn(3, N, requires_grad=True)
    (gx,) = torch.autograd.grad(ops.linear4bit(x, *packed4[:2], N, activations="int8"), x, gy, create_graph=True)
    ggx = torch.randn(3, K)
    (ggy,) = torch.autograd.grad(gx, gy, ggx)
    assert torch.equal(ggy, ops.linear4bit(ggx, *packed4[:2], N))


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("who", ["x", "bias", "both"])
def test_gradients_are_those_of_the_dense_layer(layer, dtype, who):
    function, dense = layer
    x = torch.randn(2, 5, K).to(dtype).requires_grad_(who != "bias")
    bias = torch.randn(N).to(dtype).requires_grad_(who != "x")
    gy = torch.randn(2, 5, N).to(dtype)
    function(x, bias).backward(gy)
    if who != "bias":
        assert x.grad.dtype == dtype
        near(x.grad, gy.float() @ dense, dtype)
    if who != "x":
        assert bias.grad.dtype == dtype
        near(bias.grad, gy.float().sum((0, 1)), dtype)


def test_bias_gradient_is_summed_in_float32(packed4):
    bias = torch.zeros(N, dtype=torch.bfloat16, requires_grad=True)
    ops.linear4bit(torch.ones(4096, K, dtype=torch.bfloat16), *packed4[:2], N, bias).sum().backward()
    assert (bias.grad == 4096).all()  # a running bfloat16 sum of ones stops at 256


@pytest.mark.parametrize("gradient", [
    lambda y: y.sum(),  # expanded: all strides zero
    lambda y: (y.transpose(0, 1) * 2).sum() + y[:, ::2].sum(),
    lambda y: y.flip(0).cumsum(1)[::2].sum(),
])
def test_gradients_of_any_strides(layer, gradient):
    function, dense = layer
    x = torch.randn(6, K, requires_grad=True)
    y = torch.randn(6, K, requires_grad=True)
    with torch.no_grad():
        y.copy_(x)
    gradient(function(x)).backward()
    gradient(F.linear(y, dense)).backward()
    near(x.grad, y.grad)


def test_what_is_saved_for_backward_are_the_packed_tensors(packed4):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear4bit(torch.randn(2, K, requires_grad=True), *packed4[:2], N)
    assert {t.data_ptr() for t in saved} == {p.data_ptr() for p in packed4[:2]}


def test_no_gradient_is_recorded_without_need(layer):
    function, _ = layer
    x = torch.randn(2, K, requires_grad=True)
    with torch.no_grad():
        assert function(x).grad_fn is None
    with torch.inference_mode():
        assert function(x).grad_fn is None
    assert function(x.detach()).grad_fn is None and function(x).grad_fn is not None


def test_second_derivatives(layer):
    function, dense = layer
    x = torch.randn(3, K, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for tensor, f in ((x, function), (y, lambda v: F.linear(v, dense))):
        gradient, = torch.autograd.grad(f(tensor).pow(3).sum(), tensor, create_graph=True)
        gradient.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3 * y.grad.abs().max().item())


def test_torch_func(packed4):
    qweight, absmax, dense = packed4
    xs = torch.randn(5, K)

    def f(x):
        return ops.linear4bit(x, qweight, absmax, N)

    near(torch.func.vmap(f)(xs), F.linear(xs, dense))
    near(torch.func.jacrev(f)(xs[0]), dense)
    near(torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(xs), dense.sum(0).expand(5, K))
    with pytest.raises(NotImplementedError):
        torch.func.vmap(lambda q: ops.linear4bit(xs, q, absmax, N))(torch.stack([qweight, qweight]))


def test_forward_mode_is_refused_and_not_ignored(layer):
    function, _ = layer
    x = torch.randn(2, K)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        function(torch.autograd.forward_ad.make_dual(x, x))


# ------------------------------------------------------------------ autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_as_a_dense_layer_would(layer, dtype):
    function, dense = layer
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, z = function(x), F.linear(x, dense)
    assert y.dtype == z.dtype == dtype
    assert torch.equal(y, function(x.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False):
        assert function(x).dtype == torch.float32


def test_autocast_keeps_an_explicit_compute_dtype(packed4):
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear4bit(x, *packed4[:2], N, compute_dtype=torch.float32)
    want = ops.linear4bit(x.bfloat16().float(), *packed4[:2], N).bfloat16()
    assert torch.equal(y, want)


# ------------------------------------------------------------------ tracing


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_keeps_one_graph_and_the_same_bits(layer, dynamo, requires_grad):
    function, _ = layer
    bias = torch.randn(N, requires_grad=requires_grad)

    def f(x):
        return function(x * 2, bias).relu()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a = torch.randn(3, K, requires_grad=requires_grad)
    b = a.detach().clone().requires_grad_(requires_grad)
    ya, yb = compiled(a), f(b)
    assert torch.equal(ya, yb)
    if requires_grad:
        ya.sum().backward()
        bias_grad, bias.grad = bias.grad, None
        yb.sum().backward()
        assert torch.equal(a.grad, b.grad) and torch.equal(bias_grad, bias.grad)


def test_compile_does_not_recompile_for_another_batch_size(layer, dynamo):
    function, _ = layer
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, K))
        with dynamo.config.patch(error_on_recompile=True):
            for m in (4, 7, 100):
                x = torch.randn(m, K)
                assert torch.equal(compiled(x), function(x))


def test_compile_follows_autocast(layer, dynamo):
    function, _ = layer
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), function(x)) and compiled(x).dtype == torch.bfloat16
    assert compiled(x).dtype == torch.float32


def test_compile_of_the_weight_operations(packed4, packed8, dynamo):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(w):
        packed = ops.quantize_4bit(w, double_quant=True)
        q8, absmax8 = ops.quantize_8bit(w)
        return (ops.dequantize_4bit(packed.qweight, ops.dequantize_absmax(*packed[1:]), (N, K)),
                ops.dequantize_8bit(q8, absmax8))

    dense4, dense8 = f(torch.from_numpy(weight(N, K)))
    near(dense4, packed4[2], torch.bfloat16)
    assert torch.equal(dense8, packed8[2])


def test_export_keeps_the_operators(packed4, packed8):
    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.linear4bit(x, *packed4[:2], N) + ops.linear8bitlt(x, *packed8[:2])

    program = torch.export.export(Model(), (torch.randn(2, K),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["bnbq.linear4bit.default", "bnbq.linear8bitlt.default", "aten.add.Tensor"]
    x = torch.randn(2, K)
    assert torch.equal(program.module()(x), Model()(x))


def operators(packed4, packed8):
    x, gy, bias = torch.randn(3, K), torch.randn(3, N), torch.randn(N)
    q4, a4, _ = packed4
    q8, a8, dense = packed8
    codes = ops.quantize_absmax(a4)
    return {
        "quantize_4bit": (dense, "nf4", 64),
        "dequantize_4bit": (q4, *codes, [N, K], "nf4", 64, torch.bfloat16),
        "quantize_absmax": (a4,),
        "dequantize_absmax": codes,
        "quantize_8bit": (dense, 32),
        "dequantize_8bit": (q8, a8, 0, torch.float16),
        "linear4bit": (x, q4, *codes, bias, N, "nf4", 64, None, "int8"),
        "linear4bit_backward": (gy, q4, a4, None, None, K, "nf4", 64, "bfloat16"),
        "linear8bitlt": (x, q8, a8, None, 6.0, 0),
        "linear8bitlt_backward": (gy, q8, a8, 0),
    }


@pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit", "quantize_absmax", "dequantize_absmax",
                                  "quantize_8bit", "dequantize_8bit", "linear4bit", "linear4bit_backward",
                                  "linear8bitlt", "linear8bitlt_backward"])
def test_operators_keep_the_rules_of_torch_library(name, packed4, packed8):
    arguments = operators(packed4, packed8)[name]
    torch.library.opcheck(getattr(torch.ops.bnbq, name).default, arguments)


def test_fake_and_meta_tensors_get_shapes(packed4, packed8):
    with FakeTensorMode() as mode:
        q4, a4, q8, a8 = map(mode.from_tensor, (*packed4[:2], *packed8[:2]))
        x = torch.empty(2, 5, K, dtype=torch.bfloat16)
        assert ops.linear4bit(x, q4, a4, N).shape == (2, 5, N)
        assert ops.linear8bitlt(x, q8, a8).dtype == torch.bfloat16
        assert ops.quantize_4bit(torch.empty(5, 100)).qweight.shape == (250,)
        with pytest.raises(ValueError, match="x has 5 columns, the weight has k = 128"):
            ops.linear4bit(torch.empty(2, 5), q4, a4, N)
    q4, a4, q8, a8 = (p.to("meta") for p in (*packed4[:2], *packed8[:2]))
    x = torch.empty(2, K, device="meta", requires_grad=True)
    for y in (ops.linear4bit(x, q4, a4, N), ops.linear8bitlt(x.detach(), q8, a8), ops.dequantize_8bit(q8, a8)[:2, :N]):
        assert y.is_meta and y.shape == (2, N)


def test_dispatch_modes_see_the_operators(layer):
    function, _ = layer

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    x = torch.randn(2, K)
    with Recorder():
        y = function(x)
    assert [name for name in seen if name.startswith("bnbq.linear")] and torch.equal(y, function(x))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_jit_trace_records_the_call(layer):
    function, _ = layer
    traced = torch.jit.trace(lambda x: function(x), torch.randn(2, K))
    x = torch.randn(2, K)
    assert torch.equal(traced(x), function(x))


def test_plain_subclasses_and_negated_views(layer):
    class Named(torch.Tensor):
        pass

    function, _ = layer
    x = torch.randn(2, K)
    y = function(x.as_subclass(Named))
    assert type(y) is Named and torch.equal(y.as_subclass(torch.Tensor), function(x))
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert torch.equal(function(negated), function(-x))
