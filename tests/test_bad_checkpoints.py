"""Damaged, incomplete and inconsistent checkpoints: each is an exception that names the file, layer or tensor."""

import json
import shutil
import struct

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import checkpoint  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
LAYER = "model.layers.1.mlp.up_proj"
TWIN = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Quantised checkpoints: native nf4, double-quantised and int8, and nf4 in bitsandbytes' format."""
    root = tmp_path_factory.mktemp("sources")
    transformers.utils.logging.disable_progress_bar()
    small_models.llama(root / "float")
    kinds = {
        "nf4": dict(bits=4),
        "dq": dict(bits=4, double_quant=True),
        "int8": dict(bits=8),
        "bnb4": dict(bits=4, double_quant=True, checkpoint_format="bitsandbytes"),
        "bnb8": dict(bits=8, checkpoint_format="bitsandbytes"),
    }
    for name, settings in kinds.items():
        AUTO.from_pretrained(root / "float", quantization_config=bnbq.BnbqConfig(**settings)).save_pretrained(
            root / name
        )
    return root


class Damage:
    """A copy of a checkpoint, and ways to spoil it. ``keep`` keeps the file's metadata (with the checksums)."""

    def __init__(self, source, folder):
        shutil.copytree(source, folder)
        self.folder, self.file = folder, folder / "model.safetensors"

    def edit(self, change, keep=True):
        with safe_open(self.file, "pt") as file:
            metadata = file.metadata() if keep else {"format": "pt"}
        tensors = load_file(self.file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file, metadata)
        return self

    def config(self, **changes):
        path = self.folder / "config.json"
        values = json.loads(path.read_text())
        values["quantization_config"].update(changes)
        path.write_text(json.dumps(values))
        return self

    def load(self, **kwargs):
        return bnbq.from_pretrained(AUTO, self.folder, **kwargs)

    def refused(self, *words, error=ValueError):
        with pytest.raises(error) as caught:
            self.load()
        for word in words:
            assert word in str(caught.value), f"{word!r} not in: {caught.value}"


@pytest.fixture
def damage(sources, tmp_path):
    def make(kind):
        copy = Damage(sources / kind, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        copy.load()  # sound before it is spoilt
        return copy

    return make


@pytest.mark.parametrize(
    "kind, leaf",
    [
        ("nf4", "qweight"),
        ("nf4", "absmax"),
        ("dq", "absmax"),
        ("dq", "absmax2"),
        ("dq", "absmax_offset"),
        ("int8", "qweight"),
        ("int8", "absmax"),
    ],
)
@pytest.mark.parametrize("keep", [True, False], ids=["checksums", "no checksums"])
def test_missing_tensor(damage, kind, leaf, keep):
    damage(kind).edit(lambda t: t.pop(f"{LAYER}.{leaf}"), keep).refused(
        f"{LAYER}.{leaf}", "missing", "model.safetensors"
    )


@pytest.mark.parametrize("keep", [True, False], ids=["checksums", "no checksums"])
def test_missing_layer(damage, keep):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            del tensors[name]

    damage("dq").edit(drop, keep).refused(LAYER, "incomplete")
    damage("bnb4").edit(drop, keep).refused(LAYER, "incomplete")


def test_extra_tensor(damage):
    damage("nf4").edit(lambda t: t.update({f"{LAYER}.absmax2": torch.ones(1)})).refused(
        f"{LAYER}.absmax2", "unexpected"
    )
    damage("int8").edit(lambda t: t.update({f"{LAYER}.absmax_offset": torch.ones(1)})).refused(
        f"{LAYER}.absmax_offset", "unexpected"
    )
    damage("nf4").edit(lambda t: t.update({"model.norm.absmax": torch.ones(1)})).refused("model.norm.absmax", "RMSNorm")
    damage("nf4").edit(lambda t: t.update({f"{LAYER}.weight": torch.ones(128, 64)})).refused(
        f"{LAYER}.weight", "unexpected"
    )


def test_swapped_tensors(damage):
    """Two layers of one shape: only the checksums tell."""
    for kind, leaf in (("nf4", "absmax"), ("nf4", "qweight"), ("dq", "absmax2"), ("int8", "absmax")):

        def swap(tensors, leaf=leaf):
            a, b = f"{LAYER}.{leaf}", f"{TWIN}.{leaf}"
            tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

        damage(kind).edit(swap).refused(f"up_proj.{leaf}", "CRC-32", "model.safetensors")


def test_altered_bytes(damage):
    for kind in ("nf4", "dq", "int8"):
        copy = damage(kind)
        data = bytearray(copy.file.read_bytes())
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        begin = 8 + struct.unpack("<Q", data[:8])[0] + header[f"{LAYER}.qweight"]["data_offsets"][0]
        data[begin + 77] ^= 0x10
        copy.file.write_bytes(data)
        copy.refused(f"{LAYER}.qweight", "CRC-32", "model.safetensors")
        with pytest.raises(ValueError, match="CRC-32"):  # in bitsandbytes' keywords as well as in the stock call
            AUTO.from_pretrained(copy.folder)


def test_mismatched_shape_and_dtype(damage):
    damage("nf4").edit(lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"][:-1]})).refused(
        f"{LAYER}.absmax", "[127, 1]", "[128, 1]"
    )
    damage("nf4").edit(lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"].bfloat16()})).refused(
        f"{LAYER}.absmax", "BF16", "F32"
    )
    damage("nf4").edit(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()})).refused(
        f"{LAYER}.qweight", "F32", "U8"
    )
    damage("int8").edit(lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].t()})).refused(
        f"{LAYER}.qweight", "[64, 128]"
    )
    damage("dq").edit(lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"].float()})).refused(
        f"{LAYER}.absmax", "F32", "U8"
    )


def test_a_float_checkpoint_that_says_it_is_quantised(sources, tmp_path):
    shutil.copytree(sources / "float", tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": bnbq.BnbqConfig().to_dict()}))
    with pytest.raises(ValueError, match="no layer of the model is in these files"):
        AUTO.from_pretrained(tmp_path / "copy")


def test_settings_that_do_not_fit_the_tensors(damage):
    damage("nf4").config(double_quant=True).refused("absmax")
    damage("nf4").config(blocksize=32).refused("absmax")
    damage("nf4").config(bits=8, quant_type="int8", blocksize=0).refused("qweight")
    damage("int8").config(bits=4, quant_type="nf4", blocksize=64).refused("qweight")
    damage("nf4").config(version=2).refused("version", "2", "upgrade")
    damage("nf4").config(blocksize=48).refused("blocksize", "48")
    damage("nf4").config(quant_type="nf5").refused("nf5")
    damage("nf4").config(surprise=1).refused("surprise", error=TypeError)


def test_truncated_and_foreign_files(damage):
    for length in (-1, -1000, 3000, 100, 8, 3, 0):
        copy = damage("nf4")
        data = copy.file.read_bytes()
        copy.file.write_bytes(data[:length])
        copy.refused("model.safetensors", "not a whole safetensors file")
    copy = damage("nf4")
    copy.file.write_bytes(b"<html>404</html>" * 99)
    copy.refused("model.safetensors")


def test_lies_in_the_header(damage):
    for key, value in (
        ("shape", [1 << 40, 1 << 40]),
        ("shape", [-1, 32]),
        ("data_offsets", [0, 1 << 60]),
        ("dtype", "Q4"),
        ("shape", None),
    ):
        copy = damage("nf4")
        data = copy.file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        header[f"{LAYER}.qweight"][key] = value
        text = json.dumps(header).encode()
        copy.file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        copy.refused("model.safetensors")


def test_missing_shard(sources, tmp_path):
    model = AUTO.from_pretrained(sources / "nf4")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        AUTO.from_pretrained(tmp_path / "sharded")


def test_a_shard_of_another_model(sources, tmp_path):
    """Same names and shapes, other weights: every shard records the checksums of the whole checkpoint."""
    AUTO.from_pretrained(sources / "nf4").save_pretrained(tmp_path / "a", max_shard_size="30KB")
    small_models.llama(tmp_path / "other float", seed=9)
    AUTO.from_pretrained(tmp_path / "other float", quantization_config=bnbq.BnbqConfig()).save_pretrained(
        tmp_path / "b", max_shard_size="30KB"
    )
    name = sorted(p.name for p in (tmp_path / "a").glob("model-*.safetensors"))[1]
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(ValueError, match="CRC-32"):
        AUTO.from_pretrained(tmp_path / "a")


# ------------------------------------------------------------------ bitsandbytes' format

STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def state(**changes):
    def change(tensors):
        values = json.loads(bytes(tensors[STATE].tolist()))
        values.update(changes)
        tensors[STATE] = torch.tensor(
            list(json.dumps({k: v for k, v in values.items() if v != "gone"}).encode()), dtype=torch.uint8
        )

    return change


@pytest.mark.parametrize(
    "leaf",
    [
        "weight",
        "weight.absmax",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_bitsandbytes_missing(damage, leaf):
    damage("bnb4").edit(lambda t: t.pop(f"{LAYER}.{leaf}")).refused(
        LAYER, leaf.removeprefix("weight.").split(".bits")[0]
    )


def test_bitsandbytes_without_its_codebook_is_fine(damage):
    wanted = damage("bnb4").load().state_dict()
    model = damage("bnb4").edit(lambda t: t.pop(f"{LAYER}.weight.quant_map")).load()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(shape=[64, 128]), ["shape", "(64, 128)"]),
        (dict(shape=[128]), ["shape"]),
        (dict(shape=[128, -64]), ["shape"]),
        (dict(shape="gone"), []),
        (dict(blocksize=100), ["blocksize", "100"]),
        (dict(blocksize=True), ["blocksize"]),
        (dict(blocksize=32), ["absmax", "256"]),
        (dict(quant_type="fp4"), ["quant_type", "fp4"]),
        (dict(quant_type=["nf4"]), ["quant_type"]),
        (dict(dtype="float128"), ["dtype", "float128"]),
        (dict(nested_offset="x"), ["nested_offset"]),
        (dict(nested_offset=float("nan")), ["nested_offset"]),
        (dict(nested_blocksize=0), ["nested_blocksize"]),
        (dict(nested_dtype="int8"), ["nested_dtype"]),
        (dict(nested_blocksize=2**40), ["nested_blocksize"]),
    ],
)
def test_bitsandbytes_quant_state(damage, changes, words):
    copy = damage("bnb4").edit(state(**changes))
    if words:
        copy.refused(LAYER, *words)
    else:
        copy.load()


def test_bitsandbytes_damage(damage):
    blob = lambda data: lambda t: t.update({STATE: torch.tensor(list(data), dtype=torch.uint8)})  # noqa: E731
    damage("bnb4").edit(blob(b"{]")).refused(LAYER, "JSON")
    damage("bnb4").edit(blob(b"[1]")).refused(LAYER, "JSON")
    damage("bnb4").edit(blob(b"\xff\xfe")).refused(LAYER, "JSON")
    damage("bnb4").edit(blob(b" " * 70000)).refused(LAYER, "65536")
    damage("bnb4").edit(lambda t: t[f"{LAYER}.weight.quant_map"].add_(0.01)).refused(LAYER, "codebook")
    damage("bnb4").edit(lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-1]})).refused(
        LAYER, "4095", "4096"
    )
    damage("bnb4").edit(lambda t: t[f"{LAYER}.weight.nested_absmax"].fill_(float("nan"))).refused(
        LAYER, "nested_absmax", "nan"
    )
    damage("bnb4").edit(lambda t: t.update({f"{LAYER}.SCB": torch.ones(128)})).refused(LAYER)
    damage("bnb4").edit(lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"].float()})).refused(
        LAYER, "absmax", "uint8"
    )
    damage("bnb8").edit(lambda t: t.pop(f"{LAYER}.SCB")).refused(LAYER, "SCB")
    damage("bnb8").edit(lambda t: t.update({f"{LAYER}.SCB": torch.ones(5)})).refused(LAYER, "SCB", "128")
    damage("bnb8").edit(lambda t: t[f"{LAYER}.SCB"].fill_(float("inf"))).refused(LAYER, "SCB", "inf")
    damage("bnb8").edit(lambda t: t.update({f"{LAYER}.weight_format": torch.tensor(2, dtype=torch.uint8)})).refused(
        LAYER, "weight_format"
    )
    damage("bnb8").edit(lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].float()})).refused(LAYER, "int8")


# ------------------------------------------------------------------ bnbq.save and bnbq.load


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 64), torch.nn.LayerNorm(64)
    )
    bnbq.quantize_model(model, bnbq.BnbqConfig(bits=4, blocksize=32))
    return checkpoint.save(model, tmp_path / "plain")


def empty():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 64), torch.nn.LayerNorm(64)
    )


def edit_plain(folder, change, keep=True):
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        metadata = file.metadata() if keep else None
    tensors = load_file(folder / checkpoint.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("0.absmax"), ["0.absmax", "missing"]),
        (lambda t: t.update({"1.absmax": torch.ones(3)}), ["1.absmax", "unexpected"]),
        (lambda t: t["0.qweight"].add_(1), ["0.qweight", "CRC-32"]),
        (lambda t: t["3.weight"].add_(1), ["3.weight", "CRC-32"]),
        (lambda t: t.update({"0.absmax": t["0.absmax"].half()}), ["0.absmax", "F16"]),
        (lambda t: t.update({"0.qweight": t["0.qweight"][:4].clone()}), ["0.qweight", "[4, 32]"]),
    ],
)
def test_plain_tensors(plain, change, words):
    checkpoint.load(empty(), plain)
    edit_plain(plain, change)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(empty(), plain)
    for word in [*words, "model.safetensors"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(format="gguf"), ["format"]),
        (dict(version=2), ["version 2"]),
        (dict(layers=[1]), ["layers"]),
        (dict(layers={"9": {}}), ["different saves"]),
    ],
)
def test_plain_settings(plain, change, words):
    path = plain / checkpoint.SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError) as caught:
        checkpoint.load(empty(), plain)
    assert all(word in str(caught.value) for word in words), caught.value
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bnbq\.json.*JSON"):
        checkpoint.load(empty(), plain)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"bnbq\.json"):
        checkpoint.load(empty(), plain)


@pytest.mark.parametrize(
    "change",
    [
        {"class": "Linear"},
        {"in_features": -1},
        {"in_features": "64"},
        {"bias": 1},
        {"blocksize": 33},
        {"quant_type": "nf9"},
        {"weight_dtype": "int8"},
        {"surprise": 1},
        {"in_features": 33},
        {"out_features": 1 << 60},
    ],
)
def test_plain_layer_settings(plain, change):
    path = plain / checkpoint.SETTINGS
    settings = json.loads(path.read_text())
    settings["layers"]["0"].update(change)
    path.write_text(json.dumps(settings))
    edit_settings = {"bnbq": json.dumps(settings, sort_keys=True)}
    tensors = load_file(plain / checkpoint.WEIGHTS)
    save_file(tensors, plain / checkpoint.WEIGHTS, edit_settings)
    with pytest.raises((ValueError, TypeError)) as caught:
        checkpoint.load(empty(), plain)
    assert "bnbq.json: 0" in str(caught.value)


def test_plain_truncated_and_mixed(plain, tmp_path):
    data = (plain / checkpoint.WEIGHTS).read_bytes()
    (plain / checkpoint.WEIGHTS).write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors.*not a whole"):
        checkpoint.load(empty(), plain)
    (plain / checkpoint.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        checkpoint.load(empty(), plain)
    other = empty()
    bnbq.quantize_model(other, bnbq.BnbqConfig(bits=8))
    checkpoint.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / checkpoint.WEIGHTS, plain / checkpoint.WEIGHTS)
    with pytest.raises(ValueError, match="different saves"):
        checkpoint.load(empty(), plain)
    with pytest.raises(ValueError, match=r"no layer '2'|64 -> 48"):
        (plain / checkpoint.WEIGHTS).write_bytes(data)
        checkpoint.load(torch.nn.Sequential(torch.nn.Linear(32, 48)), plain)
