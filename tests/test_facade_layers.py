"""`bnbq.bitsandbytes.nn`: bitsandbytes' layers, whose weights no move, cast, copy, save or forward changes."""

import copy
import inspect
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import bnbq.bitsandbytes as bnb  # noqa: E402
import cases  # noqa: E402
from bnbq import nn, ops  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "fp4": lambda **k: bnb.nn.Linear4bit(128, 24, **k),
    "nf4": lambda **k: bnb.nn.LinearNF4(128, 24, compress_statistics=False, **k),
    "nf4 in bf16": lambda **k: bnb.nn.LinearNF4(128, 24, quant_storage=torch.bfloat16, **k),
    "fp4 k=96": lambda **k: bnb.nn.LinearFP4(96, 24, bias=False, **k),
    "int8": lambda **k: bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False, threshold=3.0, **k),
}
EMBEDDINGS = {
    "fp4": lambda **k: bnb.nn.Embedding4bit(20, 128, **k),
    "nf4": lambda **k: bnb.nn.EmbeddingNF4(20, 128, quant_storage=torch.float32, **k),
    "fp4 dim=50": lambda **k: bnb.nn.EmbeddingFP4(20, 50, **k),
    "int8": lambda **k: bnb.nn.Embedding8bit(20, 50, **k),
}


def packed(layer):
    """Every tensor that makes up the weight."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Int8Params):
        return [weight.data, weight.SCB]
    stored = weight.quant_state.as_dict(packed=True)
    return [weight.data.view(torch.uint8), *(stored[key] for key in sorted(stored))]


def same(a, b) -> bool:
    a, b = packed(a), packed(b)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (gx,) = torch.autograd.grad(y.float().square().sum(), x)
    return y.detach(), gx


# ------------------------------------------------------------------ quantising


def test_defaults_are_bitsandbytes():
    layer = bnb.nn.Linear4bit(128, 24)
    weight = layer.weight
    assert (weight.quant_type, weight.blocksize, weight.compress_statistics, weight.quant_storage) == ("fp4", 64, True, torch.uint8)
    assert not weight.bnb_quantized and weight.dtype == torch.float32 and not weight.requires_grad
    assert layer.compute_dtype is None and layer.quant_state is None and weight.module is layer
    eight = bnb.nn.Linear8bitLt(128, 24)
    assert eight.state.has_fp16_weights and eight.state.threshold == 0.0 and eight.weight.requires_grad
    assert not bnb.nn.Params4bit(torch.ones(2)).requires_grad and bnb.nn.Int8Params(torch.ones(2)).requires_grad
    assert bnb.nn.Embedding4bit(4, 64).weight.quant_type == "fp4"


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: torch.nn.Sequential(m).to(torch.device("cpu"), torch.bfloat16)[0]])
@pytest.mark.parametrize("name", LAYERS)
def test_a_move_quantises_once(name, move):
    layer = LAYERS[name]()
    w = layer.weight.data.clone()
    parameter = layer.weight
    layer = move(layer)
    assert layer.weight is parameter and same(layer, move(copy.deepcopy(layer)))
    if name == "int8":
        qweight, absmax = ops.quantize_8bit(w)
        assert torch.equal(parameter.data, qweight) and torch.equal(parameter.SCB, absmax)
        assert torch.equal(parameter.CB, qweight) and not parameter.requires_grad
    else:
        core = ops.quantize_4bit(w, parameter.quant_type, 64, parameter.compress_statistics)
        assert torch.equal(parameter.data.view(torch.uint8).flatten(), core.qweight.flatten())
        assert torch.equal(parameter.quant_state.absmax, core.absmax.flatten())
        assert layer.quant_state is parameter.quant_state and parameter.quant_state.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_casts_and_meta_quantise_nothing(name):
    layer = LAYERS[name]().half()
    assert layer.weight.dtype == torch.float16 and isinstance(layer.weight, (bnb.nn.Params4bit, bnb.nn.Int8Params))
    assert LAYERS[name](device="meta").weight.is_meta and not LAYERS[name]().to("meta").weight.is_packed
    if name != "int8":
        with pytest.raises(RuntimeError, match="not quantised yet; move the layer to a device"):
            layer(torch.ones(1, layer.in_features))


def test_weights_that_are_not_finite_are_refused_and_kept():
    layer = bnb.nn.Linear4bit(64, 4)
    layer.weight.data[2, 3] = float("inf")
    with pytest.raises(ValueError, match=r"inf at index \(2, 3\)"):
        layer.to("cpu")
    assert layer.weight.shape == (4, 64) and not layer.weight.bnb_quantized


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_the_native_layers(name, dtype):
    layer = LAYERS[name]().to("cpu")
    native = bnb.to_bnbq(layer)
    assert type(native) is (nn.Linear8bitLt if name == "int8" else nn.Linear4bit)
    x = torch.randn(2, 3, layer.in_features, dtype=dtype) * 2
    for ours, theirs in zip(results(layer, x), results(native, x), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == dtype
    assert layer(x[:0]).shape == (0, 3, 24)


@pytest.mark.parametrize("compute_dtype", [None, *FLOATS])
def test_compute_dtype_holds_for_every_call(compute_dtype):
    """bitsandbytes takes None to be the dtype of the first input, and rounds a float32 bias to that for good."""
    layer = bnb.nn.LinearNF4(128, 24, compute_dtype=compute_dtype).to("cpu")
    core, state = layer.weight.data.view(24, 64), layer.quant_state
    bias = layer.bias.detach().clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        x = torch.randn(3, 128, dtype=dtype)
        wanted = ops.linear4bit(x, core, state.absmax.view(24, 2), 24, bias, absmax2=state.state2.absmax,
                                absmax_offset=state.offset.view(1), compute_dtype=compute_dtype)
        assert torch.equal(layer(x), wanted) and layer(x).dtype == dtype
    assert layer.compute_dtype == compute_dtype and torch.equal(layer.bias, bias) and layer.bias.dtype == torch.float32


def test_a_float_weight_in_linear8bitlt_trains():
    layer, x = bnb.nn.Linear8bitLt(64, 24), torch.randn(8, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad(set_to_none=False)  # leaves weight.grad, which stops bitsandbytes from requantising
        loss = (layer(x) - x[:, :24]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    layer.eval()  # with the weight of now, not of the last training step
    assert torch.equal(layer(x), ops.linear8bitlt(x, *ops.quantize_8bit(layer.weight.detach()), layer.bias, threshold=0.0))
    assert set(layer.state_dict()) == {"weight", "bias"} and layer.to("cpu").weight.dtype == torch.float32


def test_autocast_returns_the_inputs_dtype():
    for layer in (bnb.nn.Linear4bit(64, 8).to("cpu"), LAYERS["int8"]().to("cpu"), bnb.nn.Linear8bitLt(64, 8)):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, layer.in_features)).dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_in_one_graph_with_gradients(name):
    layer = LAYERS[name]().to("cpu")
    x = torch.randn(3, layer.in_features)
    wanted = results(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, x), wanted, strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------ state


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def reloaded(layer, name, **kwargs):
    new = LAYERS[name](**({"device": "meta"} if kwargs else {}))
    assert str(new.load_state_dict(saved(layer), **kwargs)) == "<All keys matched successfully>"
    return new


CHANGES = {
    "eval forward": lambda layer, name: (layer.eval()(torch.ones(2, layer.in_features)), layer.train())[1],
    "bf16 forward": lambda layer, name: (layer(torch.ones(2, layer.in_features).bfloat16()), layer)[1],
    "backward": lambda layer, name: (results(layer, torch.ones(2, layer.in_features)), layer)[1],
    "state_dict": lambda layer, name: (layer.state_dict(), layer)[1],
    "half": lambda layer, name: layer.half().float(),
    "to bf16": lambda layer, name: torch.nn.Sequential(layer).to(torch.bfloat16)[0].float(),
    "type": lambda layer, name: layer.type(torch.float64).float(),
    "to cpu": lambda layer, name: layer.to("cpu", torch.float32).cpu(),
    "deepcopy": lambda layer, name: copy.deepcopy(layer),
    "copy weight": lambda layer, name: (setattr(layer, "weight", copy.copy(layer.weight)), layer)[1],
    "deepcopy weight": lambda layer, name: (setattr(layer, "weight", copy.deepcopy(layer.weight)), layer)[1],
    "pickle": lambda layer, name: pickle.loads(pickle.dumps(layer)),
    "pickle weight": lambda layer, name: (setattr(layer, "weight", pickle.loads(pickle.dumps(layer.weight))), layer)[1],
    "reload": reloaded,
    "reload onto meta": lambda layer, name: reloaded(layer, name, assign=True),
    "native and back": lambda layer, name: restored(bnb.from_bnbq(bnb.to_bnbq(layer)), layer),
}


def restored(new, old):
    if isinstance(new, bnb.nn.Linear4bit) and old.weight.quant_storage != torch.uint8:  # the storage dtype is bitsandbytes' own
        new.weight.set_packed(new.weight.data.flatten().view(old.weight.quant_storage).unsqueeze(1), new.quant_state)
    return new


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_changes_a_quantised_weight(name, change):
    """bitsandbytes 0.50.2 on a CPU with AVX-512 BF16 repacks the weight in its first eval forward: gradients stop
    there, and what is saved afterwards has transposed bfloat16 scales. Its pickles lose the class of the weight, its
    casts convert packed bytes that are stored in a float dtype, and it cannot load its own state dicts."""
    layer = LAYERS[name]().to("cpu")
    x = torch.randn(4, layer.in_features) * 2
    before, y = copy.deepcopy(layer), results(layer, x)
    keys = {key: (value.dtype, value.shape) for key, value in layer.state_dict().items()}
    for _ in range(2):
        layer = CHANGES[change](layer, name)
        bias = layer.bias
        if bias is not None:
            bias.data.copy_(before.bias)  # casts round it, as they do any bias
        assert same(layer, before) and type(layer.weight) is type(before.weight)
        assert {key: (value.dtype, value.shape) for key, value in layer.state_dict().items()} == keys
        assert all(torch.equal(a, b) for a, b in zip(results(layer, x), y, strict=True))


def test_copies_belong_to_themselves():
    """The weight of bitsandbytes' deep copies still tells the original layer when it is quantised."""
    layer = bnb.nn.Linear4bit(64, 8)
    twin = copy.deepcopy(layer).to("cpu")
    assert twin.weight.module is twin and layer.quant_state is None and twin.quant_state is twin.weight.quant_state
    assert copy.deepcopy(twin.weight).module is twin
    twin.weight.data.fill_(0)
    assert not same(layer.to("cpu"), twin)


def test_a_weight_that_became_a_plain_parameter_keeps_its_state():
    """FSDP and others replace Parameters; the layer knows the state too."""
    layer, x = bnb.nn.Linear4bit(64, 8).to("cpu"), torch.randn(2, 64)
    y, stored = layer(x), layer.state_dict()
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), y) and layer.state_dict().keys() == stored.keys()
    layer.load_state_dict(stored)
    assert isinstance(layer.weight, bnb.nn.Params4bit) and torch.equal(layer(x), y)
    for key in stored:
        if key.startswith("weight."):  # what FSDP does with names
            found = layer
            for part in key.split("."):
                found = getattr(found, part)
            assert torch.equal(found, stored[key])
    assert not hasattr(bnb.nn.Linear4bit(64, 8).weight, "absmax")
    layer = bnb.nn.LinearNF4(64, 8, bias=False, quant_storage=torch.bfloat16).to("cpu")
    y = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer.half().float()(x), y)  # the storage is a float one, the bytes are no floats


def test_a_new_float_weight_is_not_described_by_the_old_state():
    layer = bnb.nn.Linear4bit(64, 8).to("cpu")
    layer.weight = bnb.nn.Params4bit(torch.randn(8, 64), module=layer)
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError, match="not quantised yet"):
        layer(torch.ones(1, 64))
    assert layer.to("cpu").quant_state is layer.weight.quant_state


def test_shards_keep_the_class():
    weight = bnb.nn.Linear4bit(64, 8).to("cpu").weight
    for part in (*torch.chunk(weight, 2), *torch.split(weight, 64)):
        assert type(part) is bnb.nn.Params4bit and part.quant_state is weight.quant_state and len(part) < len(weight)


def test_prequantized_weights():
    layer = bnb.nn.LinearNF4(64, 8, device="meta")
    stored = bnb.nn.LinearNF4(64, 8).to("cpu").state_dict()
    packed_weight, statistics = stored["weight"], {key: v for key, v in stored.items() if key.startswith("weight.")}
    layer.weight = bnb.nn.Params4bit.from_prequantized(packed_weight, statistics, device="cpu", module=layer)
    layer.bias = torch.nn.Parameter(stored["bias"])
    assert layer.weight.bnb_quantized and layer.quant_state.quant_type == "nf4" and len(statistics) == 5
    assert {key: value.tolist() for key, value in layer.state_dict().items()} == {k: v.tolist() for k, v in stored.items()}


# ------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_float_state_dicts_load_into_either(name, quantized):
    """Into a quantised int8 layer bitsandbytes copies them as integers: zeros."""
    source = LAYERS[name]()
    layer = LAYERS[name]()
    if quantized:
        layer.to("cpu")
    layer.load_state_dict(source.state_dict())
    assert same(layer.to("cpu"), source.to("cpu"))


@pytest.mark.parametrize("kind, damage, message", [
    ("nf4", lambda d: d.pop("weight.absmax"), "missing weight.absmax"),
    ("nf4", lambda d: d.update({"weight.absmax": d["weight.absmax"][1:]}), "absmax has 47 values; wanted 48"),
    ("nf4", lambda d: d.update(weight=d["weight"][1:]), "1535 bytes; wanted 1536"),
    ("nf4", lambda d: d.update({"weight.quant_map": d["weight.quant_map"] * 2}), "not the nf4 codebook"),
    ("nf4", lambda d: [d.pop(key) for key in list(d) if "." in key], "without weight.absmax; wanted a float weight"),
    ("nf4", lambda d: d.update({"weight.absmax": 3}), "weight.absmax is a int, wanted a tensor"),
    ("int8", lambda d: d.update(weight_format=torch.tensor(2, dtype=torch.uint8)), 'only 0 \\("row"\\) can be read'),
    ("int8", lambda d: d.update(weight=d["weight"].float()), "weight is float32 \\[24, 128\\]; wanted int8"),
    ("int8", lambda d: d.pop("SCB"), "missing SCB"),
])
def test_damaged_entries_leave_the_layer_as_it_was(kind, damage, message):
    layer = LAYERS[kind]().to("cpu")
    before, entries = copy.deepcopy(layer), dict(LAYERS[kind]().to("cpu").state_dict())
    damage(entries)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(entries)
    assert same(layer, before)


def test_layouts_that_were_strings():
    """bitsandbytes 0.39 to 0.43.0 pickled the layout of int8 weights so."""
    layer = LAYERS["int8"]().to("cpu")
    entries = {**layer.state_dict(), "weight_format": "row"}
    new = LAYERS["int8"]()
    assert str(new.load_state_dict(entries)) == "<All keys matched successfully>" and same(new, layer)
    with pytest.raises(RuntimeError, match="weight_format is 'col32'"):
        new.load_state_dict({**entries, "weight_format": "col32"})


def test_int8_without_scales_is_not_taken_for_a_float_weight():
    """bitsandbytes copies the codes."""
    entries = LAYERS["int8"]().to("cpu").state_dict()
    del entries["SCB"], entries["weight_format"]
    for layer in (LAYERS["int8"](), bnb.nn.Linear8bitLt(128, 24), LAYERS["int8"]().to("cpu")):
        with pytest.raises(RuntimeError, match=r"weight is int8 \[24, 128\] without SCB; wanted a float weight"):
            layer.load_state_dict(entries)


def test_int8_entries_do_not_fit_a_trained_float_weight():
    with pytest.raises(RuntimeError, match="the layer trains float ones"):
        bnb.nn.Linear8bitLt(128, 24).load_state_dict(LAYERS["int8"]().to("cpu").state_dict())


def test_state_of_an_int8_layer_shows_its_weight():
    layer, x = LAYERS["int8"]().to("cpu"), torch.randn(3, 128)
    y = layer(x)
    assert torch.equal(layer.state.CB, layer.weight.data) and layer.state.SCB is layer.weight.SCB
    layer.state.reset_grads()  # what PEFT does after a merge
    layer.state.CxB = None  # and Accelerate when it offloads
    assert torch.equal(layer(x), y) and layer.state.SCB is layer.weight.SCB
    layer.weight = bnb.nn.Int8Params(torch.ones(24, 128), requires_grad=False).to("cpu")
    assert torch.equal(layer.weight.data, torch.full((24, 128), 127, dtype=torch.int8))
    torch.testing.assert_close(layer(torch.ones(1, 128)), 128 + layer.bias[None])


def test_a_tied_float_weight_saves_as_one():
    layer = bnb.nn.Linear8bitLt(8, 8, bias=False, has_fp16_weights=False)
    layer.weight = torch.nn.Parameter(torch.randn(8, 8))
    assert set(layer.state_dict()) == {"weight"} and layer(torch.ones(1, 8)).shape == (1, 8)


# ------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_decode_the_rows_they_are_asked_for(name):
    layer = EMBEDDINGS[name]()
    dense = torch.from_numpy(cases.weight(20, layer.embedding_dim))
    layer.load_state_dict({"weight": dense})
    with pytest.raises(RuntimeError, match="not quantised yet"):
        layer(torch.tensor([0]))
    layer.to("cpu")
    table = layer(torch.arange(20))
    if name == "int8":
        assert torch.equal(table, ops.dequantize_8bit(*ops.quantize_8bit(dense)))
    else:
        assert torch.equal(table, bnb.functional.dequantize_4bit(layer.weight.data, layer.quant_state))
        assert not layer.quant_state.nested
    assert (table - dense).norm() < 0.15 * dense.norm() and table.dtype == torch.float32
    index = torch.tensor([[3, 3, 19], [0, 7, 1]])
    assert torch.equal(layer(index), table[index])
    with pytest.raises(IndexError):
        layer(torch.tensor([20]))
    other = EMBEDDINGS[name]()  # bitsandbytes' embeddings cannot be saved
    other.load_state_dict(layer.state_dict())
    assert same(layer, other) and torch.equal(other(index), table[index])


def test_rows_that_are_not_whole_blocks_are_warned_of(caplog):
    EMBEDDINGS["fp4 dim=50"]()
    assert "rows of 50 elements are not whole blocks of 64" in caplog.text


def test_embedding_dtype():
    assert bnb.nn.Embedding4bit(4, 64, dtype=torch.bfloat16).to("cpu")(torch.tensor([1])).dtype == torch.bfloat16


def test_positional_arguments_are_in_bitsandbytes_order():
    assert list(inspect.signature(bnb.nn.Linear4bit.__init__).parameters)[1:] == [
        "input_features", "output_features", "bias", "compute_dtype", "compress_statistics", "quant_type", "quant_storage", "device",
    ]
    assert list(inspect.signature(bnb.nn.Linear8bitLt.__init__).parameters)[1:] == [
        "input_features", "output_features", "bias", "has_fp16_weights", "threshold", "index", "device",
    ]
