"""`bnbq quantize`: the files hold what quantising while loading gives, and nothing is left behind when it fails."""

import json
import os
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import processes  # noqa: E402
import small_models  # noqa: E402
from bnbq import checkpoint, shards, stream  # noqa: E402
from bnbq.config import BnbqConfig  # noqa: E402
from bnbq.errors import UserError  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
SETTINGS = {
    "nf4": {"bits": 4},
    "fp4-b128-dq": {"bits": 4, "quant_type": "fp4", "blocksize": 128, "double_quant": True},
    "int4-skip": {"bits": 4, "quant_type": "int4", "skip_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "int8": {"bits": 8},
    "int8-b64": {"bits": 8, "blocksize": 64},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("source") / "llama")


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def quantize(source, target, settings=None, **arguments):
    return stream.quantize_checkpoint(source, target, BnbqConfig(**(settings or {})), **arguments)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_quantising_while_loading(source, tmp_path, name):
    summary = quantize(source, tmp_path / "out", SETTINGS[name])
    loaded = AUTO.from_pretrained(tmp_path / "out")
    on_the_fly = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(**SETTINGS[name]))
    same_state(loaded, on_the_fly)
    assert summary.quantized == sum(isinstance(m, (bnbq.nn.Linear4bit, bnbq.nn.Linear8bitLt)) for m in loaded.modules())
    assert summary.linears == sum(isinstance(m, torch.nn.Linear) for m in loaded.modules())
    assert "lm_head" in summary.kept
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, on_the_fly(ids).logits)


@pytest.mark.parametrize(
    "make", [small_models.gpt2, small_models.bert, small_models.mixture], ids=["conv1d", "bert", "experts"]
)
def test_other_architectures(tmp_path, make):
    folder = make(tmp_path / "float")
    summary = quantize(folder, tmp_path / "out")
    if make is small_models.mixture:
        assert summary.experts == 4 and "linear layers and expert weights" in summary.text()
        copied = quantize(folder, tmp_path / "bitsandbytes", {"checkpoint_format": "bitsandbytes"})
        assert copied.experts == 0 and "model.layers.*.mlp.experts.*.up_proj.weight" in copied.text()
    auto = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    same_state(
        auto.from_pretrained(tmp_path / "out"), auto.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    )


@pytest.mark.parametrize("layout", ["bnbq", "bitsandbytes"])
@pytest.mark.parametrize(
    "make", [small_models.llama, small_models.gpt2, small_models.mixture], ids=["llama", "conv1d", "experts"]
)
@pytest.mark.parametrize("settings", [{"bits": 4, "double_quant": True}, {"bits": 8}], ids=["nf4-dq", "int8"])
def test_the_files_of_save_pretrained(tmp_path, make, layout, settings):
    """Loading with a config and saving writes the same tensors under the same names, and the same checksums."""
    folder = make(tmp_path / "float")
    settings = {**settings, "checkpoint_format": layout}
    AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig(**settings)).save_pretrained(tmp_path / "saved")
    quantize(folder, tmp_path / "out", settings)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    sums = [shards.Source(tmp_path / name).metadata["model.safetensors"] for name in ("out", "saved")]
    assert checkpoint.recorded_checksums(sums[0]) == checkpoint.recorded_checksums(sums[1])


def test_a_file_named_like_the_base_model(tmp_path):
    """GPT-2's published files lack the prefix that its language model has."""
    folder = small_models.gpt2(tmp_path / "float")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantize(folder, tmp_path / "out")
    same_state(
        AUTO.from_pretrained(tmp_path / "out"), AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    )


def test_float_checkpoint_with_another_dtype_in_its_config(tmp_path):
    """from_pretrained rounds to the config's dtype before it quantises, and so does the stream."""
    folder = small_models.llama(tmp_path / "float", dtype=torch.float32)
    small_models.edit_config(folder, dtype="bfloat16")
    quantize(folder, tmp_path / "out")
    same_state(
        AUTO.from_pretrained(tmp_path / "out"), AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    )


def test_config_without_dtype_gets_one(tmp_path):
    folder = small_models.llama(tmp_path / "float")
    small_models.edit_config(folder, dtype=None)
    quantize(folder, tmp_path / "out")
    loaded = AUTO.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    same_state(loaded, AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig()))


def test_shards_in_and_out(tmp_path):
    folder = small_models.llama(tmp_path / "float", shard="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    summary = quantize(folder, tmp_path / "out", max_shard_size=30_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert summary.shards == len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == summary.bytes_after
    same_state(
        AUTO.from_pretrained(tmp_path / "out"), AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    )


def test_odd_sizes_and_alignment(tmp_path):
    """in_features that no block divides: flat tensors, with lengths that are no multiple of 8."""
    folder = small_models.llama(
        tmp_path / "float", hidden_size=60, intermediate_size=99, num_attention_heads=2, head_dim=30
    )
    quantize(folder, tmp_path / "out")
    same_state(
        AUTO.from_pretrained(tmp_path / "out"), AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    )
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    end = 0
    for name, entry in sorted(
        ((k, v) for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    ):
        start, stop = entry["data_offsets"]
        assert start == end and start % {"F32": 4, "BF16": 2, "U8": 1}[entry["dtype"]] == 0, name
        end = stop
    assert 8 + size + end == len(raw)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 4, "quant_type": "fp4", "double_quant": True},
        {"bits": 8},
        {"bits": 4, "skip_modules": ["o_proj"]},
    ],
    ids=["nf4", "fp4-dq", "int8", "skip"],
)
def test_bitsandbytes_layout(source, tmp_path, settings):
    quantize(source, tmp_path / "out", dict(settings, checkpoint_format="bitsandbytes"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and "lm_head" in config["llm_int8_skip_modules"]
    loaded = bnbq.from_pretrained(AUTO, tmp_path / "out")
    on_the_fly = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(**settings))
    same_state(loaded, on_the_fly)
    pytest.importorskip("bitsandbytes")
    theirs = AUTO.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    same = {
        name: module for name, module in theirs.named_modules() if type(module).__module__.startswith("bitsandbytes")
    }
    assert same.keys() == {n for n, m in loaded.named_modules() if isinstance(m, bnbq.nn.QuantizedLinear)}
    for name, module in same.items():
        assert torch.equal(
            module.weight.data.view(torch.uint8).flatten(),
            loaded.get_submodule(name).qweight.view(torch.uint8).flatten(),
        ), name


def test_checksums_are_written_and_used(source, tmp_path):
    quantize(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        recorded = checkpoint.recorded_checksums(file.metadata())
        assert set(recorded) == {key for key in list(file.keys()) if key.endswith((".qweight", ".absmax"))}
        assert all(checkpoint.crc32(file.get_tensor(name)) == crc for name, crc in recorded.items())
    data = bytearray(path.read_bytes())
    where = (
        int.from_bytes(data[:8], "little")
        + 8
        + json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["model.layers.1.mlp.up_proj.qweight"][
            "data_offsets"
        ][0]
    )
    data[where + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.qweight"):
        AUTO.from_pretrained(tmp_path / "out")


def test_progress_where_it_is_asked_for(source, tmp_path, capsys):
    quantize(source, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    quantize(source, tmp_path / "loud", progress=True)
    assert "quantising" in capsys.readouterr().err


def test_side_files(source, tmp_path):
    (source / "LICENSE").write_text("mine")
    (source / "pytorch_model.bin").write_bytes(b"not copied")
    try:
        quantize(source, tmp_path / "out")
    finally:
        (source / "LICENSE").unlink()
        (source / "pytorch_model.bin").unlink()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "LICENSE",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "README.md",
    } <= names
    assert "pytorch_model.bin" not in names
    assert checkpoint.CARD_LINE in (tmp_path / "out" / "README.md").read_text()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(key.startswith("load_in") for key in config["quantization_config"])
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o755"


# ------------------------------------------------------------------ what can go wrong


def refused(source, folder, message, settings=None, **arguments):
    """The error says so, and nothing has appeared or changed."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UserError, match=message):
        quantize(source, folder / "out", settings, **arguments)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_weight_that_is_not_finite(tmp_path):
    folder = small_models.llama(tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "here").mkdir()
    refused(folder, tmp_path / "here", r"down_proj\.weight.*nan at index \[3, 5\]")


def test_infinity_made_by_the_cast(tmp_path):
    folder = small_models.llama(tmp_path / "float", dtype=torch.float32)
    small_models.edit_config(folder, dtype="float16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 1] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "here").mkdir()
    refused(
        folder, tmp_path / "here", r"up_proj\.weight.*1000000\.0 at index \[7, 1\] \(torch\.float16 cannot hold it\)"
    )


def test_truncated_source(tmp_path):
    folder = small_models.llama(tmp_path / "float", shard="60KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 100)
    (tmp_path / "here").mkdir()
    refused(folder, tmp_path / "here", f"{last.name}: not a whole safetensors file")
    last.unlink()
    refused(folder, tmp_path / "here", f"{last.name}: named in model.safetensors.index.json, but not there")


def test_hostile_index(tmp_path):
    folder = small_models.llama(tmp_path / "float", shard="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    (tmp_path / "here").mkdir()
    refused(folder, tmp_path / "here", "'../elsewhere.safetensors' is not the name of a safetensors file")
    path.write_text("[1]")
    refused(folder, tmp_path / "here", "not an index")


def test_missing_and_misshapen_weights(tmp_path):
    folder = small_models.llama(tmp_path / "float")
    (tmp_path / "here").mkdir()
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, tmp_path / "here", r"has no weight for model\.layers\.1\.self_attn\.q_proj")
    save_file(
        {**tensors, "model.layers.1.self_attn.q_proj.weight": weight[:32].clone()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    refused(folder, tmp_path / "here", r"q_proj.weight' has shape \[32, 64\], the model wants \[64, 64\]")
    save_file(
        {**tensors, "model.layers.1.self_attn.q_proj.weight": weight.to(torch.int32)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    refused(folder, tmp_path / "here", "has dtype I32")


def test_sources_that_are_none(source, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    refused(tmp_path / "nothing", here, "not a directory")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, here, "no config.json")
    (empty / "config.json").write_text((source / "config.json").read_text())
    refused(empty, here, "no model.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"")
    refused(empty, here, "only safetensors are read, found pytorch_model.bin")
    (empty / "config.json").write_text("{")
    refused(empty, here, "not JSON")
    other = small_models.llama(tmp_path / "other", tokenizer=False)
    small_models.edit_config(other, architectures=["NoSuchModel"])
    refused(other, here, "NoSuchModel")
    quantize(source, tmp_path / "done")
    refused(tmp_path / "done", here, r"already quantised \(bnbq\)")


def test_names_that_match_nothing(source, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="no_such_layer"):
        quantize(source, tmp_path / "here" / "out", {"skip_modules": ["no_such_layer"]})
    assert not any((tmp_path / "here").iterdir())


def test_destination_is_never_lost(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize(source, out)  # empty is fine
    refused(source, tmp_path, "exists and is not empty")
    before = (out / "config.json").read_text()
    quantize(source, out, {"bits": 8}, force=True)
    assert (out / "config.json").read_text() != before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"no config\.json in it"):
        quantize(source, precious, force=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for target in (source, source / "inside", source.parent):
        with pytest.raises(UserError, match=r"must lie outside|not around"):
            quantize(source, target, force=True)
    with pytest.raises(UserError, match="parent directory"):
        quantize(source, tmp_path / "no" / "where")


def test_failure_with_force_keeps_the_old_checkpoint(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(stream.shards.ShardWriter, "close", fail)
    with pytest.raises(OSError, match="disk is full"):
        quantize(source, tmp_path / "out", {"bits": 8}, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_leaves_nothing(source, tmp_path, name):
    """The signal arrives while a shard is being written."""
    arguments = ["quantize", source, tmp_path / "out"]
    processes.assert_interrupt_leaves_nothing(tmp_path, name, "bnbq.stream.convert", arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_stays_at_the_largest_layer(tmp_path):
    """130 MB of bf16 in linear layers of 16 MB: anonymous memory grows by less than two of them in fp32."""
    small_models.llama(
        tmp_path / "float",
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        tokenizer=False,
    )
    small_models.llama(tmp_path / "warm-up", tokenizer=False)
    large, small = str(tmp_path / "float"), str(tmp_path / "warm-up")
    grown, total = processes.memory_growth(
        "from bnbq.stream import quantize_checkpoint",
        f"quantize_checkpoint({small!r}, {small + '-out'!r})",
        f"summary = quantize_checkpoint({large!r}, {large + '-out'!r})",
        "summary.bytes_before",
    )
    assert total > 130e6
    assert grown < 2 * 2048 * 4096 * 4, f"{grown / 1e6:.1f} MB"


# ------------------------------------------------------------------ the writer by itself


def test_writer_refuses_what_was_not_planned(tmp_path):
    with shards.ShardWriter(tmp_path / "a.safetensors", ["x", "y"], {"format": "pt"}) as writer:
        writer.add("x", torch.ones(3))
        with pytest.raises(ValueError, match="'x' was not planned or came twice"):
            writer.add("x", torch.ones(3))
        with pytest.raises(ValueError, match="'z' was not planned"):
            writer.add("z", torch.ones(3))
        with pytest.raises(ValueError, match="complex64"):
            writer.add("y", torch.ones(3, dtype=torch.complex64))
        with pytest.raises(ValueError, match="never came: y"):
            writer.close()


def test_writer_writes_what_safetensors_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "f": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "view": torch.randn(6, 6).t(),
        "bool": torch.tensor([True, False]),
        "b": torch.randn(9, 1).bfloat16(),
    }
    path = tmp_path / "a.safetensors"
    with shards.ShardWriter(path, tensors, {"format": "pt"}, later=["sum"]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close({"sum": "0123456789abcdef"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "sum": "0123456789abcdef"}
