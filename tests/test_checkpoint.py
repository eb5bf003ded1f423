"""Tensors and files: bitsandbytes' form and ours convert without changing a bit; save and load for any module."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

import bnbq  # noqa: E402
import cases  # noqa: E402
from bnbq import checkpoint, checkpoint_bnb, nn, reference  # noqa: E402

SHAPES = [(16, 64), (5, 192), (3, 33), (1, 1), (7, 96)]


def layer4(n, k, **settings):
    dense = torch.nn.Linear(k, n, dtype=torch.bfloat16)
    dense.weight.data = torch.from_numpy(cases.weight(n, k)).bfloat16()
    return nn.Linear4bit.from_linear(dense, **settings)


def parts_of(layer, **settings):
    return checkpoint_bnb.bnb4_from_native(
        {name: getattr(layer, name).detach() for name in layer.packed_spec()},
        quant_type=layer.quant_type,
        blocksize=layer.blocksize,
        shape=(layer.out_features, layer.in_features),
        dtype=layer.weight_dtype,
        **settings,
    )


def state_tensor(parts, **changes):
    key = next(key for key in parts if "quant_state" in key)
    values = {**json.loads(bytes(parts[key].tolist())), **changes}
    return {**parts, key: torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}


# ------------------------------------------------------------------ bitsandbytes' tensors


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_there_and_back(shape, quant_type, double_quant, storage):
    layer = layer4(*shape, quant_type=quant_type, double_quant=double_quant)
    if layer.qweight.numel() % storage.itemsize:
        with pytest.raises(ValueError, match="cannot be stored"):
            parts_of(layer, quant_storage=storage)
        return
    parts = parts_of(layer, quant_storage=storage)
    assert parts["weight"].dtype == storage and parts["weight"].shape == (layer.qweight.numel() // storage.itemsize, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, settings = checkpoint_bnb.native_from_bnb4(parts, "layer", shape)
    assert (
        settings["double_quant"] == double_quant and settings["dtype"] == torch.bfloat16 and settings["shape"] == shape
    )
    assert set(tensors) == set(layer.packed_spec())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(layer, name)) and tensor.shape == getattr(layer, name).shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_there_and_back(shape):
    dense = torch.nn.Linear(shape[1], shape[0])
    layer = nn.Linear8bitLt.from_linear(dense)
    tensors, settings = checkpoint_bnb.native_from_bnb8(
        checkpoint_bnb.bnb8_from_native(dict(qweight=layer.qweight, absmax=layer.absmax)), "layer", shape
    )
    assert (
        torch.equal(tensors["qweight"], layer.qweight)
        and torch.equal(tensors["absmax"], layer.absmax)
        and settings["shape"] == shape
    )
    old = {"weight": layer.qweight.data, "SCB": layer.absmax.data.half()}  # no weight_format, half-precision scales
    assert torch.equal(checkpoint_bnb.native_from_bnb8(old)[0]["absmax"], layer.absmax.half().float())
    with pytest.raises(ValueError, match="one scale per row"):
        checkpoint_bnb.bnb8_from_native({}, blocksize=64)
    with pytest.raises(ValueError, match="int4"):
        checkpoint_bnb.bnb4_from_native({}, quant_type="int4", blocksize=64, shape=(1, 1))


def test_tolerated_variants():
    layer = layer4(16, 64)
    parts = parts_of(layer)
    want = layer.qweight, layer.absmax
    bare = {key.removeprefix("weight.") or key: value for key, value in parts.items()}
    no_map = {key: value for key, value in parts.items() if "quant_map" not in key}
    no_shape = state_tensor(parts, shape=None)
    no_dtype = state_tensor(parts, dtype=None)
    for variant in (bare, no_map, no_shape, no_dtype):
        tensors, settings = checkpoint_bnb.native_from_bnb4(variant, "layer", (16, 64))
        assert (
            torch.equal(tensors["qweight"], want[0])
            and torch.equal(tensors["absmax"], want[1])
            and settings["shape"] == (16, 64)
        )
    one = layer4(1, 33)
    scalar = {**parts_of(one), "weight.absmax": one.absmax.data.reshape(())}
    assert torch.equal(checkpoint_bnb.native_from_bnb4(scalar, "layer", (1, 33))[0]["absmax"], one.absmax)
    zeros = {
        **parts,
        "weight": torch.zeros_like(parts["weight"]),
        "weight.absmax": torch.zeros_like(parts["weight.absmax"]),
    }
    tensors, _ = checkpoint_bnb.native_from_bnb4(
        zeros, "layer", (16, 64)
    )  # as CUDA writes an all-zero block: code 0, not 7
    assert not reference.dequantize_4bit(tensors["qweight"].numpy(), tensors["absmax"].numpy(), (16, 64)).any()


def test_files_written_after_a_forward_on_a_cpu():
    """bitsandbytes transposes absmax and rounds it to bf16 then; read in order, with a warning."""
    layer = layer4(16, 192)
    parts = parts_of(layer)
    spoilt = {**parts, "weight.absmax": layer.absmax.data.t().bfloat16().contiguous()}
    with pytest.warns(UserWarning, match="after a forward pass on a CPU"):
        tensors, _ = checkpoint_bnb.native_from_bnb4(spoilt, "layer", (16, 192))
    assert torch.equal(tensors["absmax"], layer.absmax.bfloat16().float())
    assert torch.equal(tensors["qweight"], layer.qweight)
    nested = state_tensor(parts_of(layer4(16, 192, double_quant=True)), nested_dtype="bfloat16")
    with pytest.warns(UserWarning, match="decoded to float32"):
        tensors, settings = checkpoint_bnb.native_from_bnb4(nested, "layer", (16, 192))
    assert (
        tensors["absmax"].dtype == torch.float32
        and set(tensors) == {"qweight", "absmax"}
        and not settings["double_quant"]
    )


@pytest.mark.parametrize("change", ["map", "blocksize"])
def test_other_double_quantisation_is_decoded(change):
    layer = layer4(16, 192, double_quant=True)
    parts = parts_of(layer)
    codes, scale, offset = layer.absmax.data.flatten(), layer.absmax2.data, layer.absmax_offset.data
    if change == "map":
        parts["weight.nested_quant_map"] = parts["weight.nested_quant_map"] * 0.5
        want = parts["weight.nested_quant_map"][codes.long()] * scale + offset
    else:
        parts = state_tensor(parts, nested_blocksize=16)
        parts["weight.nested_absmax"] = torch.tensor([0.5, 0.25, 0.125])
        want = checkpoint_bnb.dynamic_map()[codes.long()] * parts["weight.nested_absmax"].repeat_interleave(16) + offset
    with pytest.warns(UserWarning, match="decoded to float32"):
        tensors, settings = checkpoint_bnb.native_from_bnb4(parts, "layer", (16, 192))
    assert torch.equal(tensors["absmax"].flatten(), want) and not settings["double_quant"]


# ------------------------------------------------------------------ save and load


class Net(torch.nn.Module):
    """Linears in several formats, a tied pair, buffers of both kinds, an integer parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(32, 64, dtype=dtype)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=i > 0, dtype=dtype) for i in range(4)])
        self.odd = torch.nn.Linear(64, 33, dtype=dtype)
        self.norm = torch.nn.LayerNorm(64, dtype=dtype)
        self.head = torch.nn.Linear(64, 32, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x)), self.odd(x)


def quantized_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = Net(dtype)
    for i, (kind, settings) in enumerate(
        [
            (nn.Linear4bit, dict(double_quant=True, compute_dtype=torch.bfloat16)),
            (nn.Linear8bitLt, dict(threshold=3.0)),
            (nn.Linear4bit, dict(quant_type="int4", blocksize=32)),
            (nn.Linear8bitLt, dict(blocksize=32)),
        ]
    ):
        net.blocks[i] = kind.from_linear(net.blocks[i], **settings)
    net.odd = nn.Linear4bit.from_linear(net.odd, quant_type="fp4", blocksize=128, activations="int8")
    net.steps += 4
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, dtype):
    net, ids = quantized_net(dtype), torch.arange(8)
    checkpoint.save(net, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["bnbq.json", "model.safetensors"]
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        on_meta = Net(dtype)
    on_meta.scratch = torch.ones(2)
    for model in (Net(dtype), quantized_net(dtype), on_meta, Net(torch.float16)):
        loaded = checkpoint.load(model, tmp_path)
        assert loaded is model
        for one, other in zip(loaded(ids), net(ids), strict=True):
            assert torch.equal(one, other)
        state = net.state_dict()
        assert all(
            torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
            for name, tensor in loaded.state_dict().items()
        )
        assert loaded.head.weight is loaded.embed.weight
        assert (
            loaded.blocks[0].compute_dtype == torch.bfloat16
            and (loaded.odd.activations, loaded.blocks[0].activations) == ("int8", None)
            and loaded.blocks[1].threshold == 3.0
            and loaded.blocks[0].weight_dtype == dtype
        )
        assert not any(
            p.requires_grad for name, p in loaded.named_parameters() if name.split(".")[-1] in checkpoint.PACKED_NAMES
        )
        assert loaded.norm.weight.requires_grad
    checkpoint.save(loaded, tmp_path / "again")
    one, other = load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again" / "bnbq.json").read_bytes() == (tmp_path / "bnbq.json").read_bytes()


def test_public_names(tmp_path):
    net = quantized_net()
    bnbq.save(net, tmp_path)
    assert torch.equal(bnbq.load(Net(), tmp_path)(torch.arange(4))[0], net(torch.arange(4))[0])


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    net = quantized_net()
    checkpoint.save(net, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        net.norm.weight.add_(1)

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half a file")
        raise OSError("No space left on device")

    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(net, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(net, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"weight is on the meta device"):
        checkpoint.save(torch.nn.Linear(2, 2, device="meta"), tmp_path)


def test_checksums():
    tensors = {
        "a": torch.arange(10),
        "b": torch.randn(3, 4).t(),
        "c": torch.zeros(0),
        "d": torch.ones(2, dtype=torch.bfloat16),
        "m": torch.empty(2, device="meta"),
    }
    sums = checkpoint.checksums(tensors)
    import zlib

    assert sums["a"] == f"{zlib.crc32(np.arange(10).tobytes()):08x}" and set(sums) == set("abcd")
    assert sums["b"] == checkpoint.crc32(tensors["b"].contiguous())
    assert checkpoint.verify_checksums(tensors, sums, "file") == 4
    with pytest.raises(ValueError, match=r"file: the bytes of d"):
        checkpoint.verify_checksums(tensors, {**sums, "d": "00000000"}, "file")


def test_model_card(tmp_path):
    path = checkpoint.write_model_card(tmp_path)
    first = path.read_text()
    assert "import bnbq" in first and checkpoint.write_model_card(tmp_path).read_text() == first
    path.write_text("# Mine\n")
    checkpoint.write_model_card(tmp_path)
    assert path.read_text().startswith("# Mine\n") and checkpoint.CARD_LINE in path.read_text()
