"""Linear4bit and Linear8bitLt as modules: construction, forward, casts, copies, state dicts, errors."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn as torch_nn

from bnbq import nn
from bnbq import reference as ref

N, K = 24, 128
FOUR = [
    {"quant_type": quant_type, "double_quant": double}
    for quant_type in ("nf4", "fp4", "int4")
    for double in (False, True)
]
SETTINGS = [(nn.Linear4bit, K, settings) for settings in FOUR] + [
    (nn.Linear4bit, K, {"blocksize": 32}),
    (nn.Linear4bit, 100, {"double_quant": True}),
    (nn.Linear4bit, 33, {}),
    (nn.Linear8bitLt, K, {}),
    (nn.Linear8bitLt, 100, {"blocksize": 64}),
    (nn.Linear8bitLt, K, {"threshold": 0.0}),
]


def named(case) -> str:
    kind, k, settings = case
    return f"{kind.__name__}-{k}-" + "-".join(map(str, settings.values()))


@pytest.fixture(params=SETTINGS, ids=named)
def layer(request):
    kind, k, settings = request.param
    torch.manual_seed(0)
    return kind(k, N, **settings)


def tensors(layer) -> dict:
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def specified_output(layer, x: torch.Tensor) -> np.ndarray:
    """What reference.py says about x[m, k], from the layer's own tensors."""
    q, absmax = layer.qweight.numpy(), layer.absmax.numpy()
    bias = None if layer.bias is None else layer.bias.detach().float().numpy()
    if isinstance(layer, nn.Linear8bitLt):
        return ref.linear_8bit(x.float().numpy(), q, absmax, bias, layer.threshold, layer.blocksize)
    if layer.double_quant:
        absmax = ref.dequantize_absmax(absmax, layer.absmax2.numpy(), layer.absmax_offset.numpy())
    return ref.linear_4bit(x.float().numpy(), q, absmax, layer.out_features, bias, layer.quant_type, layer.blocksize)


def close(a, b, dtype=torch.float32) -> bool:
    scale = np.abs(np.asarray(b)).max()
    return (
        np.abs(np.asarray(a, np.float64) - b).max()
        <= scale * {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    )


# ------------------------------------------------------------------ construction


def test_tensors_are_plain_frozen_parameters(layer):
    assert isinstance(layer, torch_nn.Linear) and type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    spec = layer.packed_spec()
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} == {"bias", *spec}
    assert not layer._buffers and next(iter(layer._parameters)) == "bias"
    for name, (shape, dtype) in spec.items():
        parameter = getattr(layer, name)
        assert type(parameter) is torch_nn.Parameter and not parameter.requires_grad
        assert tuple(parameter.shape) == shape and parameter.dtype == dtype
    assert layer.bias.requires_grad


def test_bytes_are_those_of_the_specification(layer):
    torch.manual_seed(3)
    dense = torch.randn(N, layer.in_features)
    layer.quantize_(dense)
    if isinstance(layer, nn.Linear8bitLt):
        q, absmax = ref.quantize_8bit(dense.numpy(), layer.blocksize)
    else:
        q, absmax = ref.quantize_4bit(dense.numpy(), layer.quant_type, layer.blocksize)
        if layer.double_quant:
            absmax, absmax2, offset = ref.quantize_absmax(absmax)
            assert np.array_equal(layer.absmax2.numpy(), absmax2) and np.array_equal(
                layer.absmax_offset.numpy(), offset
            )
    assert np.array_equal(layer.qweight.numpy().ravel(), q.ravel()) and np.array_equal(
        layer.absmax.numpy().ravel(), absmax.ravel()
    )


def test_initialised_as_nn_linear(layer):
    torch.manual_seed(5)
    twin = torch_nn.Linear(layer.in_features, N)
    torch.manual_seed(5)
    fresh = type(layer)(layer.in_features, N, **settings_of(layer))
    expected = type(layer).from_linear(twin, **settings_of(layer))
    assert_same(tensors(fresh), tensors(expected))
    fresh.quantize_(torch.zeros(N, layer.in_features))
    torch.manual_seed(5)
    fresh.reset_parameters()
    assert_same(tensors(fresh), tensors(expected))


def settings_of(layer) -> dict:
    return dict(layer.format(), **({"threshold": layer.threshold} if isinstance(layer, nn.Linear8bitLt) else {}))


def test_from_linear():
    linear = torch_nn.Linear(64, 8).bfloat16().eval()
    before = linear.weight.detach().clone()
    layer = nn.Linear4bit.from_linear(linear, quant_type="fp4", compute_dtype="float32")
    assert layer.bias is linear.bias and not layer.training and layer.weight_dtype == torch.bfloat16
    assert layer.quant_type == "fp4" and layer.compute_dtype == torch.float32
    assert (
        torch.equal(before, linear.weight)
        and (layer.dequantize(torch.float32) - before.float()).norm() < 0.2 * before.float().norm()
    )
    assert nn.Linear4bit.from_linear(torch_nn.Linear(64, 8, bias=False)).bias is None
    assert nn.LinearNF4.from_linear(linear).quant_type == "nf4" and nn.LinearFP4(64, 8).quant_type == "fp4"
    assert nn.Linear8bitLt.from_linear(linear, threshold=3.0).threshold == 3.0
    assert nn.Linear4bit.from_linear(linear.to("meta")).qweight.is_meta
    with pytest.raises(TypeError, match=r"Conv2d, expected nn.Linear or transformers' Conv1D"):
        nn.Linear4bit.from_linear(torch_nn.Conv2d(1, 1, 1))


def test_from_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 64)
    torch_nn.init.normal_(conv1d.bias)
    x = torch.randn(3, 64)
    layer = nn.Linear8bitLt.from_linear(conv1d)
    assert (layer.in_features, layer.out_features) == (64, 8)
    assert close(layer(x).detach(), conv1d(x).detach().numpy(), torch.bfloat16)


def test_meta_layers_are_unfilled(layer):
    empty = type(layer)(layer.in_features, N, device="meta", **settings_of(layer))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in layer.named_parameters()
    }
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_same(tensors(empty), tensors(layer))
    with torch.device("meta"):
        assert type(layer)(layer.in_features, N).qweight.is_meta
    moved = type(layer)(layer.in_features, N, device="meta", **settings_of(layer)).to_empty(device="cpu")
    assert moved.qweight.device.type == "cpu" and moved.absmax.dtype == layer.absmax.dtype


def test_default_dtype_is_the_weights():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = nn.Linear4bit(64, 8, double_quant=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (
        layer.weight_dtype == layer.bias.dtype == torch.bfloat16
        and layer.absmax2.dtype == layer.absmax_offset.dtype == torch.float32
    )


@pytest.mark.parametrize(
    "build, kind, text",
    [
        (lambda: nn.Linear4bit(64, 8, quant_type="nf3"), ValueError, "'nf3'; known: nf4, fp4, int4"),
        (lambda: nn.Linear4bit(64, 8, blocksize=100), ValueError, "got 100, expected one of 32"),
        (lambda: nn.Linear4bit(64, 8, compute_dtype=torch.int8), TypeError, "int8"),
        (lambda: nn.Linear4bit(64, 8, double_quant=1), TypeError, "double_quant"),
        (lambda: nn.Linear4bit(64, 8, weight_dtype=torch.int8), TypeError, "weight_dtype"),
        (lambda: nn.Linear4bit(64.0, 8), TypeError, "in_features is 64.0"),
        (lambda: nn.Linear4bit(64, -1), ValueError, "out_features is -1"),
        (lambda: nn.LinearNF4(64, 8, quant_type="fp4"), TypeError, "quant_type"),
        (lambda: nn.Linear8bitLt(64, 8, threshold=-1), ValueError, "threshold: got -1"),
        (lambda: nn.Linear8bitLt(64, 8, blocksize=3), ValueError, "expected one of 0, 32"),
        (
            lambda: nn.Linear4bit(64, 8).quantize_(torch.zeros(8, 65)),
            ValueError,
            "Linear4bit(64, 8, nf4): the new weight has shape [8, 65]",
        ),
        (lambda: nn.Linear4bit(64, 8).quantize_(torch.full((8, 64), torch.inf)), ValueError, "inf"),
        (
            lambda: setattr(nn.Linear4bit(64, 8), "compute_dtype", "int8"),
            TypeError,
            "Linear4bit.compute_dtype: got 'int8'",
        ),
        (lambda: nn.set_compute_dtype(nn.Linear4bit(64, 8), torch.int8), TypeError, "set_compute_dtype"),
        (lambda: nn.set_compute_dtype(torch_nn.Linear(4, 4), None), ValueError, "no quantised layer"),
        (lambda: nn.Linear4bit(64, 8, activations="int4"), ValueError, "Linear4bit.activations: got 'int4'"),
        (lambda: setattr(nn.Linear4bit(64, 8), "activations", 8), TypeError, "Linear4bit.activations: got 8"),
        (
            lambda: nn.set_activations(nn.Linear4bit(64, 8), "fp8"),
            ValueError,
            "set_activations: activations: got 'fp8'",
        ),
        (lambda: nn.set_activations(nn.Linear8bitLt(64, 8), "int8"), ValueError, "no 4-bit layer"),
    ],
)
def test_bad_settings(build, kind, text):
    with pytest.raises(kind) as error:
        build()
    assert text in str(error.value)


def test_the_format_cannot_be_assigned(layer):
    for name in layer.format():
        with pytest.raises(AttributeError):
            setattr(layer, name, getattr(layer, name))


# ------------------------------------------------------------------ forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_specified_product(layer, dtype, isa):
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == dtype and y.shape == (5, N)
        assert close(y.float().numpy(), specified_output(layer, x), dtype)
        assert torch.equal(layer(x.view(1, 5, -1)).view(5, N), y) and layer(x[:0]).shape == (0, N)


def test_forward_writes_nothing_and_reads_no_weight(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "weight", property(lambda self: pytest.fail("read .weight")))
    before, attributes = tensors(layer), set(layer.__dict__)
    versions = {name: parameter._version for name, parameter in layer.named_parameters()}
    objects = {name: id(parameter) for name, parameter in layer.named_parameters()}
    for dtype in (torch.float32, torch.bfloat16):
        layer(torch.randn(2, layer.in_features, dtype=dtype, requires_grad=True)).sum().backward()
        with torch.no_grad():
            layer.eval()(torch.randn(40, layer.in_features, dtype=dtype))
    assert_same(before, tensors(layer))
    assert set(layer.__dict__) == attributes
    assert versions == {name: parameter._version for name, parameter in layer.named_parameters()}
    assert objects == {name: id(parameter) for name, parameter in layer.named_parameters()}


CHANGES = {
    "written in place": lambda layer, new: [old.copy_(new[name]) for name, old in layer._parameters.items()],
    "data assigned": lambda layer, new: [setattr(old, "data", new[name]) for name, old in layer._parameters.items()],
    "other memory": lambda layer, new: [old.set_(new[name]) for name, old in layer._parameters.items()],
    "new Parameters": lambda layer, new: [
        setattr(layer, name, torch_nn.Parameter(tensor, requires_grad=False)) for name, tensor in new.items()
    ],
    "swapped": lambda layer, new: [
        torch.utils.swap_tensors(old, torch_nn.Parameter(new[name], requires_grad=old.requires_grad))
        for name, old in layer._parameters.items()
    ],
    "loaded": lambda layer, new: layer.load_state_dict(new),
    "loaded and assigned": lambda layer, new: layer.load_state_dict(new, assign=True),
    "called with other parameters": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_sees_every_change(layer, change):
    """Nothing about a layer's tensors is kept from one call to the next."""
    x = torch.randn(1, layer.in_features)
    other = type(layer)(layer.in_features, N, **layer._extra_settings())
    with torch.no_grad():
        before, want = layer(x), other(x)
        assert not torch.equal(before, want)
        if change == "called with other parameters":
            assert torch.equal(torch.func.functional_call(layer, tensors(other), (x,)), want)
            assert torch.equal(layer(x), before)
        else:
            CHANGES[change](layer, tensors(other))
            assert torch.equal(layer(x), want)
            layer.bias = None
            assert torch.equal(layer(x) + other.bias, want)


def test_gradients(layer, isa):
    x = torch.randn(3, layer.in_features, requires_grad=True)
    gy = torch.randn(3, N)
    layer.eval()
    layer(x).backward(gy)
    assert close(x.grad.numpy(), (gy.double() @ layer.dequantize(torch.float32).double()).numpy())
    assert torch.allclose(layer.bias.grad, gy.sum(0)) and layer.qweight.grad is None and layer.absmax.grad is None


def test_compute_dtype_rounds_the_input():
    torch.manual_seed(0)
    layer = nn.Linear4bit(64, 8)
    x = torch.randn(2, 64)
    exact = layer(x)
    layer.compute_dtype = "bfloat16"
    rounded = layer(x)
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert close(rounded.detach().numpy(), specified_output(layer, x.bfloat16()), torch.bfloat16)
    layer.compute_dtype = torch.float32
    assert torch.equal(layer(x), exact)
    eight = nn.Linear8bitLt(64, 8)
    assert (
        nn.set_compute_dtype(torch_nn.Sequential(eight, layer), "bfloat16") == 2
        and layer.compute_dtype == torch.bfloat16
    )
    assert torch.equal(eight(x), copy.deepcopy(eight)(x.bfloat16().float()))
    assert nn.set_compute_dtype(layer, None) == 1 and layer.compute_dtype is None


def test_int8_activations():
    torch.manual_seed(0)
    layer = nn.Linear4bit(128, 8, activations="int8", double_quant=True)
    x = torch.randn(5, 128)
    state = tensors(layer)
    rounded = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), rounded) and torch.equal(pickle.loads(pickle.dumps(layer))(x), rounded)
    assert layer.activations == "int8" and "activations=int8" in repr(layer)
    other = nn.Linear8bitLt(128, 8)
    assert nn.set_activations(torch_nn.Sequential(other, layer), None) == 1 and layer.activations is None
    assert "activations" not in repr(layer) and not torch.equal(layer(x), rounded)
    assert nn.set_activations(layer, "int8") == 1 and torch.equal(layer(x), rounded)
    assert_same(state, tensors(layer))


def test_bad_inputs(layer):
    for bad, kind in (
        (torch.zeros(2, layer.in_features + 1), ValueError),
        (torch.zeros(2, layer.in_features, dtype=torch.int32), TypeError),
    ):
        with pytest.raises(kind):
            layer(bad)


def test_repr_shows_the_format():
    assert repr(nn.Linear4bit(64, 8, double_quant=True, compute_dtype="bfloat16")) == (
        "Linear4bit(in_features=64, out_features=8, bias=True, quant_type=nf4, blocksize=64, double_quant=True, "
        "compute_dtype=bfloat16)"
    )
    assert (
        repr(nn.Linear8bitLt(64, 8, bias=False))
        == "Linear8bitLt(in_features=64, out_features=8, bias=False, threshold=6.0, blocksize=0)"
    )


# ------------------------------------------------------------------ casts, moves, copies


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
    ],
    ids=["half", "bfloat16", "float", "double", "to", "to device and dtype", "type"],
)
def test_casts_leave_packed_tensors_alone(layer, cast):
    before = tensors(layer)
    objects = {name: id(layer._parameters[name]) for name in layer.packed_spec()}
    cast(torch_nn.Sequential(layer))
    after = tensors(layer)
    expected = cast(torch_nn.Sequential(torch_nn.Linear(1, 1)))[0].bias.dtype
    assert after.pop("bias").dtype == expected
    before.pop("bias")
    assert_same(before, after)
    assert objects == {name: id(layer._parameters[name]) for name in layer.packed_spec()}
    assert layer.weight.dtype == (expected if expected != torch.float64 else torch.float32)


def test_moves_take_everything(layer):
    layer.to("meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.absmax.dtype == layer.packed_spec()["absmax"][1]


def test_copies_are_bit_exact(layer):
    x = torch.randn(4, layer.in_features)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), through_torch_save(layer)):
        assert_same(tensors(layer), tensors(copied))
        assert repr(copied) == repr(layer) and torch.equal(copied(x), layer(x))
        copied.weight.data.zero_()  # and independent
        assert layer.qweight.data_ptr() != copied.qweight.data_ptr() and not torch.equal(copied(x), layer(x))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_share_memory(layer):
    before = tensors(layer)
    layer.share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())
    assert_same(before, tensors(layer))


def in_another_process(layer, x, queue):
    queue.put(layer(x).detach().numpy())


def test_another_process_computes_the_same():
    layer, x = nn.Linear4bit(64, 8).share_memory(), torch.randn(2, 64)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(layer, x, queue))
    process.start()
    y = queue.get(timeout=60)
    process.join()
    assert np.array_equal(y, layer(x).detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.Linear4bit, nn.Linear8bitLt])
def test_compiled(kind):
    layer, x = kind(64, 32), torch.randn(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        reads = torch.compile(lambda x: x @ layer.weight.T, backend="aot_eager", fullgraph=True)
        assert torch.allclose(reads(x), x @ layer.dequantize().T)
