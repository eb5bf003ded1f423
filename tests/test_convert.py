"""`bnbq convert`: quantised formats keep the bits, float is what dequantising gives, and a failure leaves nothing."""

import json
import os
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import moe_models  # noqa: E402
import processes  # noqa: E402
import small_models  # noqa: E402
from bnbq import checkpoint, cli, convert, shards, stream  # noqa: E402
from bnbq.config import BnbqConfig  # noqa: E402
from bnbq.convert import convert_checkpoint  # noqa: E402
from bnbq.errors import UserError  # noqa: E402
from hf import AUTO, assert_same, file_tensors, layers, logits  # noqa: E402

SETTINGS = {
    "nf4": {"bits": 4},
    "nf4-dq": {"bits": 4, "double_quant": True},
    "fp4-b128": {"bits": 4, "quant_type": "fp4", "blocksize": 128},
    "int8": {"bits": 8},
}
CARD = "# A model\n\nIts text.\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A float model, and it quantised in bnbq's format under the names of SETTINGS."""
    root = tmp_path_factory.mktemp("convert")
    small_models.llama(root / "float")
    (root / "float" / "README.md").write_text(CARD)
    for name, settings in SETTINGS.items():
        stream.quantize_checkpoint(root / "float", root / name, BnbqConfig(**settings))
    return root


def same_files(one, other):
    a, b = file_tensors(one), file_tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def settings_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


# ------------------------------------------------------------------ the quantised formats


@pytest.mark.parametrize("name", SETTINGS)
def test_there_and_back(root, tmp_path, name):
    """native -> bitsandbytes -> native: the same tensors, settings and checksums; between them the same model."""
    summary = convert_checkpoint(root / name, tmp_path / "theirs", "bitsandbytes")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "bnbq")
    same_files(root / name, tmp_path / "ours")
    sums = [shards.Source(folder).metadata["model.safetensors"] for folder in (root / name, tmp_path / "ours")]
    assert checkpoint.recorded_checksums(sums[0]) == checkpoint.recorded_checksums(sums[1]) != {}
    before, after = settings_of(root / name), settings_of(tmp_path / "ours")
    assert {key: after[key] for key in SETTINGS[name]} == SETTINGS[name] and before["blocksize"] == after["blocksize"]
    assert settings_of(tmp_path / "theirs")["quant_method"] == "bitsandbytes"
    wanted = AUTO.from_pretrained(root / name)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path / "theirs"), wanted)
    assert_same(AUTO.from_pretrained(tmp_path / "ours"), wanted)
    assert summary.layers == 14 and summary.came == "bnbq" and not summary.notes


@pytest.mark.parametrize("name", SETTINGS)
def test_the_files_of_quantize(root, tmp_path, name):
    """Converting to bitsandbytes' format writes what quantising to it writes, config.json included."""
    config = BnbqConfig(**SETTINGS[name], checkpoint_format="bitsandbytes")
    stream.quantize_checkpoint(root / "float", tmp_path / "quantized", config)
    convert_checkpoint(root / name, tmp_path / "converted", "bitsandbytes")
    same_files(tmp_path / "quantized", tmp_path / "converted")
    assert {p.name for p in (tmp_path / "quantized").iterdir()} == {p.name for p in (tmp_path / "converted").iterdir()}
    for file in ("config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / "quantized" / file).read_text() == (tmp_path / "converted" / file).read_text(), file


@pytest.mark.parametrize("name", SETTINGS)
def test_bitsandbytes_loads_it(root, tmp_path, name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    convert_checkpoint(root / name, tmp_path / "theirs", "bitsandbytes")
    theirs = AUTO.from_pretrained(tmp_path / "theirs", device_map={"": "cpu"})
    found = {
        path: module
        for path, module in theirs.named_modules()
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    }
    ours = layers(AUTO.from_pretrained(root / name))
    assert found.keys() == ours.keys()
    for path, module in found.items():
        packed = module.weight.data.view(torch.uint8).flatten()
        assert torch.equal(packed, ours[path].qweight.view(torch.uint8).flatten()), path
        if "quant_type" in SETTINGS[name] or name == "nf4":
            assert torch.equal(module.weight.quant_state.absmax.flatten(), ours[path].absmax.flatten()), path


@pytest.mark.parametrize(
    "settings", [dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), dict(load_in_8bit=True)], ids=["nf4", "int8"]
)
def test_what_bitsandbytes_wrote(root, tmp_path, settings):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**settings)
    AUTO.from_pretrained(root / "float", quantization_config=config, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "theirs"
    )
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "bnbq")
    assert_same(AUTO.from_pretrained(tmp_path / "ours"), bnbq.from_pretrained(AUTO, tmp_path / "theirs"))
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", "bitsandbytes")
    theirs, back = file_tensors(tmp_path / "theirs"), file_tensors(tmp_path / "back")
    assert theirs.keys() == back.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(back[key].tolist())), key
        else:
            assert tensor.dtype == back[key].dtype and torch.equal(tensor.flatten(), back[key].flatten()), key


@pytest.mark.parametrize("to", ["bnbq", "bitsandbytes"])
def test_a_format_to_itself(root, tmp_path, to):
    convert_checkpoint(root / "nf4-dq", tmp_path / "one", to)
    convert_checkpoint(tmp_path / "one", tmp_path / "two", to)
    same_files(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------ float


@pytest.mark.parametrize("to", convert.FLOAT_TARGETS)
@pytest.mark.parametrize("name", SETTINGS)
def test_float_equals_dequantize(root, tmp_path, name, to):
    dtype = convert.FLOAT_TARGETS[to]
    convert_checkpoint(root / name, tmp_path / "dense", to)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "dense" / "README.md").read_text() == CARD  # and no "import bnbq"
    dense = AUTO.from_pretrained(tmp_path / "dense")
    packed = AUTO.from_pretrained(root / name)
    wanted = {f"{path}.weight": layer.dequantize(dtype) for path, layer in layers(packed).items()}
    assert dense.dtype == dtype and not hasattr(dense, "hf_quantizer") and len(wanted) == 14
    original = load_file(root / "float" / "model.safetensors")
    for path, tensor in dense.state_dict().items():
        assert torch.equal(tensor, wanted[path] if path in wanted else original[path].to(dtype)), path
    assert {tensor.dtype for tensor in file_tensors(tmp_path / "dense").values()} == {dtype}


def test_float_tensors_of_another_dtype_stay(root, tmp_path):
    """A norm that is kept in fp32 in a bf16 model is not rounded."""
    file = tmp_path / "mixed" / "model.safetensors"
    stream.quantize_checkpoint(root / "float", tmp_path / "mixed")
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full((64,), 1 / 3)
    save_file(tensors, file, {"format": "pt"})
    convert_checkpoint(tmp_path / "mixed", tmp_path / "dense", "fp16")
    kept = file_tensors(tmp_path / "dense")
    assert torch.equal(kept["model.norm.weight"], tensors["model.norm.weight"])
    assert kept["lm_head.weight"].dtype == torch.float16


def test_what_fp16_cannot_hold(root, tmp_path):
    small_models.llama(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors = load_file(file)
        tensors[name].view(-1)[3] = 1e6
        save_file(tensors, file, {"format": "pt"})
        stream.quantize_checkpoint(tmp_path / "float", tmp_path / "large", force=True)
        with pytest.raises(UserError, match=f"{name.removesuffix('.weight')}.* values that torch.float16 cannot hold"):
            convert_checkpoint(tmp_path / "large", tmp_path / "dense", "fp16")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["float", "large"]
        small_models.llama(tmp_path / "float")


# ------------------------------------------------------------------ other models


@pytest.mark.parametrize("make", [small_models.gpt2, small_models.bert], ids=["conv1d", "bert"])
@pytest.mark.parametrize("settings", [{"bits": 4, "blocksize": 128}, {"bits": 8}], ids=["nf4", "int8"])
def test_other_architectures(tmp_path, make, settings):
    """Conv1D's weights are stored transposed; k = 64 with blocks of 128 is packed flat, without a shape in the file."""
    folder = make(tmp_path / "float")
    stream.quantize_checkpoint(folder, tmp_path / "ours", BnbqConfig(**settings))
    auto = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    packed = auto.from_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", "bitsandbytes")
    assert_same(bnbq.from_pretrained(auto, tmp_path / "theirs"), packed)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back", "bnbq")
    same_files(tmp_path / "ours", tmp_path / "back")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "dense", "fp32")
    assert_same(auto.from_pretrained(tmp_path / "dense"), packed.dequantize(torch.float32))
    assert file_tensors(tmp_path / "dense").keys() == file_tensors(folder).keys()
    cards = [(tmp_path / name / "README.md").exists() for name in ("ours", "theirs", "back", "dense")]
    assert cards == [True, False, True, False]  # it says `import bnbq`


def test_a_file_named_like_the_base_model(tmp_path):
    """GPT-2's published files lack the prefix that its language model has."""
    folder = small_models.gpt2(tmp_path / "float")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stream.quantize_checkpoint(folder, tmp_path / "theirs", BnbqConfig(checkpoint_format="bitsandbytes"))
    packed = bnbq.from_pretrained(AUTO, tmp_path / "theirs")
    assert len(layers(packed)) == 8
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "bnbq")
    assert_same(AUTO.from_pretrained(tmp_path / "ours"), packed)
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "fp32")
    assert_same(AUTO.from_pretrained(tmp_path / "dense"), packed.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts(tmp_path, name):
    folder, _ = moe_models.build(name, tmp_path / "float")
    stream.quantize_checkpoint(folder, tmp_path / "ours")
    packed = AUTO.from_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "fp32")
    dense, info = AUTO.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(dense), logits(packed.dequantize(torch.float32)))
    with pytest.raises(UserError, match=r"model.layers.0.\S+.qweight is the weight of experts"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", "bitsandbytes")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "float", "ours"]


def test_experts_that_bitsandbytes_left_in_float(tmp_path):
    folder = small_models.mixture(tmp_path / "float")
    stream.quantize_checkpoint(folder, tmp_path / "theirs", BnbqConfig(checkpoint_format="bitsandbytes"))
    packed = bnbq.from_pretrained(AUTO, tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "bnbq")
    assert_same(AUTO.from_pretrained(tmp_path / "ours"), packed)
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "bf16")
    assert_same(AUTO.from_pretrained(tmp_path / "dense"), packed.dequantize(torch.bfloat16))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tmp_path, tied):
    folder = small_models.llama(tmp_path / "float", tie_word_embeddings=tied)
    stream.quantize_checkpoint(folder, tmp_path / "ours", BnbqConfig(quantize_embeddings=True))
    packed = AUTO.from_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", "bnbq")
    same_files(tmp_path / "ours", tmp_path / "again")
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "bf16")
    assert_same(AUTO.from_pretrained(tmp_path / "dense"), packed.dequantize(torch.bfloat16))
    with pytest.raises(UserError, match=r"model.embed_tokens.qweight is an embedding"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", "bitsandbytes")


def test_side_branches(root, tmp_path):
    """What merging may leave: a float branch beside the packed bytes."""
    from bnbq.side_branch import attach

    model = AUTO.from_pretrained(root / "nf4")
    layer = model.model.layers[0].mlp.up_proj
    attach(layer, torch.randn(2, 64) / 8, torch.randn(128, 2) / 8)
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", "bnbq")
    same_files(tmp_path / "ours", tmp_path / "again")
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "fp32")
    dense = file_tensors(tmp_path / "dense")
    assert torch.equal(dense["model.layers.0.mlp.up_proj.weight"], layer.dequantize(torch.float32))
    assert not any("side_branch" in key for key in dense)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj.qweight is of a layer with a side branch"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", "bitsandbytes")


# ------------------------------------------------------------------ refusals, and nothing left behind


@pytest.mark.parametrize(
    "settings, words",
    [({"quant_type": "int4"}, "int4; bitsandbytes has fp4 and nf4"), ({"bits": 8, "blocksize": 64}, "blocks of 64")],
    ids=["int4", "int8-b64"],
)
def test_what_bitsandbytes_has_no_format_for(root, tmp_path, settings, words, capsys):
    stream.quantize_checkpoint(root / "float", tmp_path / "ours", BnbqConfig(**settings))
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "bitsandbytes"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert "model.safetensors: model.layers.0." in error and ".qweight is int" in error
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]
    convert_checkpoint(tmp_path / "ours", tmp_path / "dense", "bf16")


def test_sources_that_are_none(root, tmp_path):
    with pytest.raises(UserError, match="not quantised.*bnbq quantize"):
        convert_checkpoint(root / "float", tmp_path / "out", "bf16")
    with pytest.raises(UserError, match="expected one of bnbq, bitsandbytes, bf16, fp16, fp32"):
        convert_checkpoint(root / "nf4", tmp_path / "out", "int8")
    small_models.llama(tmp_path / "gptq")
    small_models.edit_config(tmp_path / "gptq", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantised by gptq"):
        convert_checkpoint(tmp_path / "gptq", tmp_path / "out", "bf16")
    with pytest.raises(UserError, match="not a directory"):
        convert_checkpoint(tmp_path / "none", tmp_path / "out", "bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def test_settings_of_a_part_of_the_model(tmp_path):
    """A multimodal model's may be in its text_config; its parts have dtypes of their own."""
    quantized = {"load_in_4bit": True}
    parts = {"text_config": {"torch_dtype": "float16", "quantization_config": quantized}, "vision_config": {"depth": 2}}
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float16", **parts}))
    config, settings = convert.read_config(tmp_path)
    assert settings == {**quantized, "quant_method": "bitsandbytes"}
    convert.write_float_config(tmp_path, config, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16"},
        "vision_config": {"depth": 2},
    }


@pytest.mark.parametrize("to", ["bitsandbytes", "bf16"])
def test_damage_is_named(root, tmp_path, to):
    """A missing tensor before, and altered bytes while the files are written; DST is never there."""
    stream.quantize_checkpoint(root / "float", tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    altered = {**tensors, "model.layers.1.mlp.up_proj.qweight": tensors["model.layers.1.mlp.up_proj.qweight"] ^ 1}
    save_file(altered, file, metadata)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.qweight .*CRC-32"):
        convert_checkpoint(tmp_path / "bad", tmp_path / "out", to)
    tensors.pop("model.layers.1.mlp.up_proj.absmax")
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.absmax"):
        convert_checkpoint(tmp_path / "bad", tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_shards_in_and_out(root, tmp_path):
    convert_checkpoint(root / "nf4", tmp_path / "theirs", "bitsandbytes", max_shard_size=40_000)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    summary = convert_checkpoint(tmp_path / "theirs", tmp_path / "dense", "bf16", max_shard_size=100_000)
    assert summary.shards == len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    assert_same(
        AUTO.from_pretrained(tmp_path / "dense"), AUTO.from_pretrained(root / "nf4").dequantize(torch.bfloat16)
    )
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", "bnbq")
    same_files(root / "nf4", tmp_path / "ours")


def test_command(root, tmp_path, capsys):
    arguments = ["convert", str(root / "nf4"), str(tmp_path / "out"), "--to", "fp16"]
    assert cli.main(arguments) == 0
    assert "14 quantised layers from bnbq to fp16" in capsys.readouterr().out
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert cli.main(arguments) == 2 and "--force" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], "bf16", "--force"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    for target in convert.TARGETS:
        cli.parser().parse_args([*arguments[:-1], target])
    with pytest.raises(SystemExit):
        cli.main(arguments[:-2])


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_leaves_nothing(root, tmp_path, name):
    arguments = ["convert", root / "nf4", tmp_path / "out", "--to", "bitsandbytes"]
    processes.assert_interrupt_leaves_nothing(tmp_path, name, "bnbq.convert.Conversion.convert", arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_stays_at_the_largest_layer(tmp_path):
    """67 MB of bf16 in linear layers of up to 8 MB: anonymous memory grows by less than two of them in fp32."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16)
    small_models.llama(tmp_path / "float", **sizes, tokenizer=False)
    stream.quantize_checkpoint(tmp_path / "float", tmp_path / "large")
    small_models.llama(tmp_path / "warm-up", tokenizer=False)
    stream.quantize_checkpoint(tmp_path / "warm-up", tmp_path / "small")
    large, small = str(tmp_path / "large"), str(tmp_path / "small")
    grown, total = processes.memory_growth(
        "from bnbq.convert import convert_checkpoint",
        f"convert_checkpoint({small!r}, {small + '-out'!r}, 'bf16')",
        f"summary = convert_checkpoint({large!r}, {large + '-out'!r}, 'bf16')",
        "summary.bytes_after",
    )
    assert total > 67e6
    assert grown < 2 * 1024 * 4096 * 4, f"{grown / 1e6:.1f} MB"
