"""``layer.weight``: reading dequantises, writing requantises, and nothing else is noticed."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn as torch_nn

from bnbq import nn
from bnbq.virtual_weight import DenseWeight

KINDS = {
    "nf4": lambda **kw: nn.Linear4bit(64, 24, **kw),
    "fp4-dq": lambda **kw: nn.Linear4bit(128, 24, quant_type="fp4", double_quant=True, **kw),
    "int4-flat": lambda **kw: nn.Linear4bit(50, 24, quant_type="int4", **kw),
    "int8": lambda **kw: nn.Linear8bitLt(64, 24, **kw),
}


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    return KINDS[request.param]()


def packed(layer) -> dict:
    return {name: layer._parameters[name].clone() for name in layer.packed_spec()}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def quantized(layer, dense) -> dict:
    """The bytes that a layer like this one has for ``dense``."""
    fresh = copy.deepcopy(layer)
    return packed(fresh.quantize_(dense))


# ------------------------------------------------------------------ reading


def test_reads_like_a_parameter(layer):
    w = layer.weight
    dense = layer.dequantize()
    assert isinstance(w, torch_nn.Parameter) and isinstance(w, torch.Tensor)
    assert w.shape == dense.shape == (layer.out_features, layer.in_features)
    assert w.dtype == dense.dtype == torch.float32 and w.device == layer.qweight.device
    assert w.numel() == dense.numel() and w.dim() == 2 and w.size(1) == layer.in_features and len(w) == 24
    assert w.is_floating_point() and not w.requires_grad and w.is_leaf and w.grad is None and w.element_size() == 4
    assert torch.equal(w, dense) and torch.equal(w.float(), dense) and torch.equal(w.detach(), dense)
    assert (
        torch.equal(w @ w.T, dense @ dense.T)
        and torch.equal(w[3], dense[3])
        and torch.equal(torch.sum(w, 0), dense.sum(0))
    )
    assert torch.equal(
        torch_nn.functional.linear(torch.ones(2, layer.in_features), w),
        torch_nn.functional.linear(torch.ones(2, layer.in_features), dense),
    )
    assert np.array_equal(w.numpy(), dense.numpy()) and np.array_equal(np.asarray(w.data), dense.numpy())
    assert torch.equal(w.to(torch.float16), dense.half()) and "Weight" in repr(w)
    assert w.norm().item() == dense.norm().item() and w.tolist() == dense.tolist()


def test_looking_at_the_shell_dequantises_nothing(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "_unpack", lambda *a: pytest.fail("dequantised"))
    w = layer.weight
    assert (w.shape, w.dtype, w.device, w.ndim, w.requires_grad, w.is_meta, w.itemsize) == (
        (24, layer.in_features),
        torch.float32,
        torch.device("cpu"),
        2,
        False,
        False,
        4,
    )
    assert w.stride() == (layer.in_features, 1) and w.is_contiguous() and w.nbytes == w.numel() * 4 and hash(w) == id(w)
    assert w.data_ptr() == layer.qweight.data_ptr() and w.untyped_storage().data_ptr() == layer.qweight.data_ptr()
    assert isinstance(w, torch_nn.Parameter) and w._is_hf_initialized
    w.requires_grad_(False)
    w.requires_grad = False
    w.grad = None


def test_gradients_flow_through_operations_on_the_weight(layer):
    x = torch.ones(2, layer.in_features, requires_grad=True)
    torch_nn.functional.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad[0], layer.dequantize().sum(0))


def test_the_weight_cannot_be_made_trainable(layer):
    with pytest.raises(RuntimeError, match="quantised and cannot be trained"):
        layer.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="quantised and cannot be trained"):
        layer.weight.requires_grad = True


def test_reported_dtype_follows_casts(layer):
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16 and layer.weight.data.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16 and layer.float().weight.dtype == torch.float32


def test_what_accelerate_and_peft_ask(layer):
    """accelerate/utils/modeling.py takes None here for a layer that is still to be quantised."""
    for candidate in (layer, copy.deepcopy(layer).to("meta")):
        if isinstance(layer, nn.Linear8bitLt):
            assert candidate.weight.SCB.data_ptr() == candidate.absmax.data_ptr() and candidate.weight.SCB.shape == (24,)
            assert not hasattr(candidate.weight, "quant_state")
        else:
            assert candidate.weight.quant_state.shape == (24, layer.in_features)
            assert not hasattr(candidate.weight, "SCB")


def test_8bit_layers_have_an_inert_state():
    """accelerate/hooks.py assigns to it when it offloads."""
    layer = nn.Linear8bitLt(64, 8)
    before = packed(layer)
    layer.state.SCB = None
    layer.state.CxB = None
    layer.state = layer.state  # as PEFT does
    assert layer.state.SCB.data_ptr() == layer.absmax.data_ptr() and same(before, packed(layer))


# ------------------------------------------------------------------ copies


def test_copies_are_plain_dense_tensors(layer):
    dense = layer.dequantize()
    for copied in (
        copy.deepcopy(layer.weight),
        pickle.loads(pickle.dumps(layer.weight)),
        copy.deepcopy(layer.weight.data),
        pickle.loads(pickle.dumps(layer.weight.data)),
        layer.weight.clone(),
        layer.weight.data.clone(),
        layer.weight + 0,
        layer.weight.data.float() * 1,
        copy.deepcopy(torch_nn.Parameter(layer.weight.data)),
    ):
        assert type(copied) in (torch.Tensor, torch_nn.Parameter)
        assert torch.equal(copied, dense)
        before = packed(layer)
        with torch.no_grad():
            copied.zero_()
        assert same(before, packed(layer))


def test_saved_with_torch(layer):
    file = io.BytesIO()
    torch.save({"weight": layer.weight, "data": layer.weight.data}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["weight"], layer.dequantize()) and torch.equal(loaded["data"], layer.dequantize())


# ------------------------------------------------------------------ writing

WRITES = {
    "data +=": lambda w, d: setattr(w, "data", w.data.__iadd__(d)),
    "data = data + d": lambda w, d: setattr(w, "data", w.data + d),
    "data.add_": lambda w, d: w.data.add_(d),
    "data.copy_": lambda w, d: w.data.copy_(w.data + d),
    "data.data.add_": lambda w, d: w.data.data.add_(d),
    "data.detach().add_": lambda w, d: w.data.detach().add_(d),
    "data[...] =": lambda w, d: w.data.__setitem__(..., w.data + d),
    "view": lambda w, d: w.data.view(-1).add_(d.view(-1)),
    "view of a view": lambda w, d: w.data.view(-1).view(w.shape).add_(d),
    "transposed view": lambda w, d: w.data.T.add_(d.T),
    "out=": lambda w, d: torch.add(w.data.clone(), d, out=w.data),
    "foreach": lambda w, d: torch._foreach_add_([w.data], [d]),
    "reshape": lambda w, d: w.data.reshape(-1).add_(d.reshape(-1)),
    "weight.add_": lambda w, d: w.add_(d),
    "weight.copy_": lambda w, d: w.copy_(w + d),
    "weight[...] =": lambda w, d: w.__setitem__(..., w + d),
    "weight.view": lambda w, d: w.view(-1).add_(d.view(-1)),
    "weight.detach": lambda w, d: w.detach().add_(d),
    "weight.T": lambda w, d: w.T.add_(d.T),
    "torch.add out": lambda w, d: torch.add(w.clone(), d, out=w),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["training", "grad", "no_grad", "inference"])
def test_every_way_of_writing_requantises(layer, write, mode):
    delta = torch.randn(24, layer.in_features) * 0.05
    expected = quantized(layer, layer.dequantize() + delta)
    assert not same(expected, packed(layer))
    if mode == "training":
        if "out" in write:
            pytest.skip("torch has no gradients for out=")
        delta.requires_grad_()  # as PEFT's deltas do
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)():
        WRITES[write](layer.weight, delta)
    assert same(expected, packed(layer))
    assert all(not parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


def test_writing_a_part(layer):
    expected = layer.dequantize()
    expected[2, 3:9] = 0.25
    expected[5] *= 2
    first = layer.dequantize()
    first[2, 3:9] = 0.25
    layer.weight.data[2, 3:9] = 0.25
    assert same(packed(layer), quantized(layer, first))
    dense = layer.weight.data  # writes through one copy add up, with no requantisation between
    layer.weight = first
    dense = layer.weight.data
    base = layer.dequantize()
    dense[5] *= 2
    dense[6].zero_()
    base[5] *= 2
    base[6] = 0
    assert same(packed(layer), quantized(layer, base)) and torch.equal(dense, base)


def test_assigning(layer):
    dense = torch.randn(24, layer.in_features)
    layer.weight = dense
    assert same(packed(layer), quantized(layer, dense)) and layer.weight.dtype == torch.float32
    layer.weight = torch_nn.Parameter(dense.bfloat16())
    assert same(packed(layer), quantized(layer, dense.bfloat16())) and layer.weight.dtype == torch.bfloat16
    layer.weight.data = dense.t().contiguous().t()
    assert same(packed(layer), quantized(layer, dense)) and layer.weight.dtype == torch.float32
    assert "weight" not in layer._parameters and "weight" not in layer.__dict__


def test_assigning_its_own_weight_keeps_the_bytes(layer):
    """PEFT does it when it unloads; requantising could move a scale by an ulp."""
    before, versions = packed(layer), [layer._parameters[name]._version for name in layer.packed_spec()]
    layer.weight = layer.weight
    layer.weight.data = layer.weight
    assert same(before, packed(layer)) and versions == [
        layer._parameters[name]._version for name in layer.packed_spec()
    ]


def test_assigning_from_another_layer(layer):
    other = copy.deepcopy(layer).bfloat16()
    other.weight.data.normal_()
    layer.weight = other.weight
    assert same(packed(layer), packed(other)) and layer.weight.dtype == torch.bfloat16
    layer.weight.data[0] = 0  # and they are not tied
    assert not same(packed(layer), packed(other))
    different = nn.Linear4bit(layer.in_features, 24, blocksize=32)
    different.weight = other.weight
    assert same(packed(different), quantized(different, other.dequantize()))


@pytest.mark.parametrize(
    "value, kind, text",
    [
        (torch.zeros(8, 63), ValueError, "shape [8, 63], expected [8, 64]"),
        (torch.zeros(8, 64, dtype=torch.int8), TypeError, "int8 [8, 64], expected a float tensor"),
        (None, TypeError, "NoneType"),
        ("w", TypeError, "str"),
        (torch.full((8, 64), float("nan")), ValueError, "nan"),
        (torch.zeros(8, 64, device="meta"), ValueError, "meta"),
    ],
)
def test_bad_assignments_change_nothing(value, kind, text):
    layer = nn.Linear4bit(64, 8)
    before = packed(layer)
    for assign in (lambda: setattr(layer, "weight", value), lambda: setattr(layer.weight, "data", value)):
        with pytest.raises(kind) as error:
            assign()
        assert text in str(error.value)
    assert same(before, packed(layer)) and layer.weight_dtype == torch.float32


def test_a_nan_written_in_place_is_an_error_and_the_layer_is_as_before(layer):
    before = packed(layer)
    with pytest.raises(ValueError, match="nan"):
        layer.weight.data[1, 2] = float("nan")
    assert same(before, packed(layer))


def test_numpy_views_are_read_only(layer):
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.data.numpy()[0] = 1


def test_initialisers_write_through(layer):
    before = packed(layer)
    torch_nn.init.normal_(layer.weight, std=0.02)
    assert not same(before, packed(layer))
    torch_nn.init.zeros_(layer.weight)
    assert not layer.dequantize().any()


def test_a_dense_copy_outlives_its_layer():
    dense = nn.Linear4bit(64, 8).weight.data
    dense.add_(1)
    assert type(dense) is DenseWeight and torch.isfinite(dense).all()


def test_building_a_float_layer_from_it(layer):
    linear = torch_nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data = layer.weight.data
    before = packed(layer)
    assert type(linear.weight) is torch_nn.Parameter and torch.equal(linear.weight, layer.dequantize())
    with torch.no_grad():
        linear.weight.add_(1)
    assert same(before, packed(layer))


def test_writes_keep_the_parameter_objects(layer):
    objects = [layer._parameters[name] for name in layer.packed_spec()]
    layer.weight.data *= 2
    layer.weight = torch.randn(24, layer.in_features)
    assert all(a is layer._parameters[name] for a, name in zip(objects, layer.packed_spec(), strict=True))


def test_operations_that_pass_by_torch_function(layer):
    """C++ that calls the dispatcher sees the dense weight too, and writes through."""
    delta = torch.randn(24, layer.in_features)
    expected = quantized(layer, layer.dequantize() + delta)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.mul.Tensor(layer.weight, 2), layer.dequantize() * 2)
        torch.ops.aten.add_.Tensor(layer.weight, delta)
    assert same(expected, packed(layer))


# ------------------------------------------------------------------ meta


def test_on_meta():
    layer = nn.Linear4bit(64, 8, device="meta")
    assert (
        layer.weight.is_meta
        and layer.weight.data.is_meta
        and layer.weight.shape == (8, 64)
        and (layer.weight + 1).is_meta
    )
    layer.weight.data += 1
    layer.weight = torch.empty(8, 64, device="meta")
    assert layer.qweight.is_meta
    dense = torch.randn(8, 64)
    layer.weight = dense
    assert not layer.qweight.is_meta and torch.equal(layer.weight, nn.Linear4bit(64, 8).quantize_(dense).dequantize())


def test_half_on_meta():
    """While weights are loaded one by one, some of a layer's tensors have data and others do not."""
    layer = nn.Linear4bit(64, 8, double_quant=True, device="meta")
    layer._parameters["qweight"] = torch_nn.Parameter(torch.zeros(8, 32, dtype=torch.uint8), requires_grad=False)
    assert layer.weight.quant_state is not None and layer.weight.device.type == "cpu"


def test_the_encoder_fast_path_of_torch_is_not_taken():
    """nn.TransformerEncoderLayer hands raw weights to a fused kernel unless they are overloaded."""
    torch.manual_seed(0)
    block = torch_nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    block.linear1, block.linear2 = nn.Linear4bit.from_linear(block.linear1), nn.Linear4bit.from_linear(block.linear2)
    calls = []
    block.linear1.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        y = block(x)
    assert calls and torch.isfinite(y).all()
