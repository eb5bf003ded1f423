"""State dicts of quantised layers: exact round trips, foreign entries, and errors that change nothing."""

import io
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn as torch_nn

from bnbq import checkpoint_bnb, nn

CASES = {
    "nf4": lambda: nn.Linear4bit(128, 24),
    "fp4 dq": lambda: nn.Linear4bit(128, 24, quant_type="fp4", double_quant=True),
    "int4 flat": lambda: nn.Linear4bit(50, 24, quant_type="int4", bias=False),
    "int8": lambda: nn.Linear8bitLt(128, 24),
    "int8 blocks": lambda: nn.Linear8bitLt(100, 24, blocksize=64),
}


@pytest.fixture(params=CASES)
def build(request):
    torch.manual_seed(0)
    return CASES[request.param]


def packed(layer) -> dict:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def model(layer):
    return torch_nn.ModuleDict({"block": torch_nn.ModuleDict({"proj": layer})})


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through", [lambda s: s, saved, dict], ids=["state_dict", "torch.save", "plain dict"])
def test_round_trip(build, through, assign):
    source, target = model(build()), model(build())
    assert not same(packed(source), packed(target))
    result = target.load_state_dict(through(source.state_dict()), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys and same(packed(source), packed(target))
    assert all(
        type(p) is torch_nn.Parameter and not p.requires_grad for n, p in target.named_parameters() if "bias" not in n
    )


def test_metadata_is_plain_and_says_the_format(build):
    layer = build()
    metadata = saved(model(layer).state_dict())._metadata["block.proj"]["bnbq"]
    assert metadata == {"version": 1, **layer.format()} and all(type(v) in (int, str, bool) for v in metadata.values())
    assert layer.state_dict()._metadata[""]["bnbq"] == metadata  # also of a layer alone


def test_a_dense_weight_is_quantised(build):
    layer = build()
    linear = torch_nn.Linear(layer.in_features, 24, bias=layer.bias is not None).bfloat16()
    layer.load_state_dict(linear.state_dict())
    expected = type(layer).from_linear(linear, **layer.format())
    assert all(torch.equal(getattr(layer, name), getattr(expected, name)) for name in layer.packed_spec())
    assert layer.bias is None or torch.equal(layer.bias, linear.bias.float())


def test_nothing_for_a_layer_leaves_it_alone(build):
    layer = build()
    before = packed(layer)
    result = layer.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(before) and same(before, packed(layer))
    with pytest.raises(RuntimeError, match=r"Missing key.*qweight"):
        layer.load_state_dict({})


def test_unexpected_entries_are_reported(build):
    layer = build()
    state = {**layer.state_dict(), "extra": torch.zeros(1)}
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["extra"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict(state)


def test_meta_layer_without_assign_warns_like_torch():
    layer = nn.Linear4bit(64, 8, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.load_state_dict(nn.Linear4bit(64, 8).state_dict())
    assert any("no-op" in str(w.message) for w in caught) and layer.qweight.is_meta


# ------------------------------------------------------------------ errors


def expect_refusal(layer, state, *texts):
    """load_state_dict fails, strict or not, with these texts, and the layer is as it was."""
    root = model(layer)
    before = packed(root)
    named = OrderedDict((f"block.proj.{name}", value) for name, value in state.items())
    if hasattr(state, "_metadata"):
        named._metadata = {"block.proj": state._metadata[""]}
    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            root.load_state_dict(named, strict=strict)
        for text in ("block.proj", *texts):
            assert text in str(error.value), str(error.value)
        assert same(before, packed(root))


def test_another_format_is_named(build):
    nf4, fp4 = nn.Linear4bit(64, 8), nn.Linear4bit(64, 8, quant_type="fp4")
    expect_refusal(fp4, nf4.state_dict(), "quant_type='nf4'", "quant_type='fp4'")
    expect_refusal(nf4, saved(fp4.state_dict()), "quant_type='fp4'", "quant_type='nf4'")
    expect_refusal(nn.Linear4bit(64, 8, blocksize=32), nf4.state_dict(), "blocksize=64", "blocksize=32")


def test_double_and_plain_scales_do_not_mix():
    plain, double = nn.Linear4bit(128, 8), nn.Linear4bit(128, 8, double_quant=True)
    for state in (dict(double.state_dict()), double.state_dict()):
        expect_refusal(plain, state, "double")
    for state in (dict(plain.state_dict()), plain.state_dict()):
        expect_refusal(double, state, "double")
    expect_refusal(
        plain, dict(double.state_dict()), "double quantised", "double_quant=False", "build it with double_quant=True"
    )


def test_a_newer_version_says_upgrade():
    layer = nn.Linear4bit(64, 8)
    state = layer.state_dict()
    state._metadata[""]["bnbq"]["version"] = 9
    expect_refusal(layer, state, "version 9", "upgrade bnbq")


@pytest.mark.parametrize(
    "change, texts",
    [
        (lambda s: s.pop("absmax"), ["qweight but not absmax", "wanted all of qweight, absmax"]),
        (lambda s: s.pop("qweight"), ["absmax but not qweight"]),
        (
            lambda s: s.update(absmax=s["absmax"].half()),
            ["block.proj.absmax: got float16 [24, 2], wanted float32 [24, 2]"],
        ),
        (lambda s: s.update(absmax=s["absmax"].T), ["got float32 [2, 24], wanted float32 [24, 2]"]),
        (lambda s: s.update(absmax=s["absmax"].reshape(-1)), ["got float32 [48]"]),
        (
            lambda s: s.update(qweight=s["qweight"].char()),
            ["block.proj.qweight: got int8 [24, 64], wanted uint8 [24, 64]"],
        ),
        (lambda s: s.update(qweight=s["qweight"][:8]), ["got uint8 [8, 64]"]),
        (lambda s: s.update(qweight=[1, 2]), ["got a list"]),
        (lambda s: s.update(bias=torch.zeros(8)), ["block.proj.bias: got float32 [8], wanted shape [24]"]),
        (lambda s: s.update(absmax2=torch.zeros(1), absmax_offset=torch.zeros(1)), ["double quantised"]),
        (lambda s: s.update(weight=torch.zeros(24, 128)), ["absmax, qweight and also weight"]),
    ],
)
def test_native_entries_are_checked(change, texts):
    layer = nn.Linear4bit(128, 24)
    state = dict(nn.Linear4bit(128, 24).state_dict())
    change(state)
    expect_refusal(layer, state, *texts)


def test_int8_entries_are_checked():
    layer = nn.Linear8bitLt(128, 24)
    expect_refusal(
        layer, {**layer.state_dict(), "absmax": torch.zeros(24, 1)}, "got float32 [24, 1], wanted float32 [24]"
    )
    expect_refusal(
        layer,
        dict(nn.Linear4bit(128, 24).state_dict()),
        "block.proj.qweight: got uint8 [24, 64], wanted int8 [24, 128]",
    )
    expect_refusal(nn.Linear8bitLt(128, 24, blocksize=64), layer.state_dict(), "blocksize=0", "blocksize=64")


@pytest.mark.parametrize(
    "weight, texts",
    [
        (torch.zeros(24, 127), ["float32 [24, 127]", "shape [24, 128]"]),
        (torch.full((24, 128), torch.nan), ["block.proj.weight", "nan"]),
        (torch.zeros(24, 128, dtype=torch.int8), ["int8 [24, 128] without the scales"]),
    ],
)
def test_dense_entries_are_checked(weight, texts):
    expect_refusal(nn.Linear4bit(128, 24), {"weight": weight, "bias": torch.zeros(24)}, *texts)


# ------------------------------------------------------------------ bitsandbytes' entries


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("k", [128, 100])
def test_bitsandbytes_4bit_entries(quant_type, double_quant, k):
    settings = {"quant_type": quant_type, "double_quant": double_quant}
    source, target = nn.Linear4bit(k, 24, **settings), nn.Linear4bit(k, 24, **settings)
    entries = checkpoint_bnb.bnb4_from_native(
        {name: getattr(source, name).data for name in source.packed_spec()},
        quant_type=quant_type,
        blocksize=64,
        shape=(24, k),
    )
    state = {f"block.proj.{name}": value for name, value in entries.items()} | {"block.proj.bias": source.bias.data}
    result = model(target).load_state_dict(state)
    assert not result.unexpected_keys and same(packed(source), packed(target))
    other = nn.Linear4bit(k, 24, quant_type="fp4" if quant_type == "nf4" else "nf4", double_quant=double_quant)
    expect_refusal(
        other, {**entries, "bias": source.bias.data}, f"quant_type={quant_type!r}", f"quant_type={other.quant_type!r}"
    )
    expect_refusal(
        nn.Linear4bit(k, 24, quant_type=quant_type, double_quant=not double_quant),
        entries,
        f"double_quant={double_quant}",
    )
    expect_refusal(nn.Linear8bitLt(k, 24), entries)
    expect_refusal(nn.Linear4bit(k + 1, 24, **settings), entries, "shape")


def test_bitsandbytes_8bit_entries():
    source, target = nn.Linear8bitLt(128, 24), nn.Linear8bitLt(128, 24)
    entries = {
        "weight": source.qweight.data,
        "SCB": source.absmax.data,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    target.load_state_dict({**entries, "bias": source.bias.data})
    assert same(packed(source), packed(target))
    expect_refusal(target, {"weight": entries["weight"], "bias": source.bias.data}, "without the scales")
    expect_refusal(target, {**entries, "weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format")
    expect_refusal(nn.Linear4bit(128, 24), entries)


def test_layers_of_bitsandbytes_itself():
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(128, 24, quant_type="nf4", compress_statistics=True)
    theirs.weight = bnb.nn.Params4bit(
        torch.randn(24, 128), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to("cpu")
    ours = nn.Linear4bit(128, 24, double_quant=True)
    ours.load_state_dict(theirs.state_dict())
    dense = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(dense.dtype), dense) and torch.equal(ours.bias, theirs.bias)
