"""Checkpoints as bitsandbytes has written them over the years, and its traps: each loads, and saves in both formats
without a bit changed, or says what is wrong with it."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import cli, stream  # noqa: E402
from bnbq.config import BnbqConfig  # noqa: E402
from bnbq.convert import convert_checkpoint  # noqa: E402
from hf import AUTO, assert_same, layers  # noqa: E402

KINDS = {
    "nf4": dict(bits=4),
    "nf4-dq": dict(bits=4, double_quant=True),
    "b128": dict(bits=4, blocksize=128, quant_type="fp4"),
    "int8": dict(bits=8),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints in bitsandbytes' present layout; test_bitsandbytes_parity.py compares them with its own."""
    root = tmp_path_factory.mktemp("ages")
    transformers.utils.logging.disable_progress_bar()
    small_models.llama(root / "float")
    for name, settings in KINDS.items():
        config = BnbqConfig(**settings, checkpoint_format="bitsandbytes")
        stream.quantize_checkpoint(root / "float", root / name, config)
        tensors = load_file(root / name / "model.safetensors")
        save_file(tensors, root / name / "model.safetensors", {"format": "pt"})  # theirs have no checksums
    return root


def each(leaf, change):
    """An edit: ``change(tensor)`` in place of every tensor of that name; None removes it."""

    def edit(tensors):
        for key in [key for key in tensors if key.endswith(f".{leaf}") and ".layers." in key and "norm" not in key]:
            value = change(tensors.pop(key))
            if value is not None:
                tensors[key] = value.contiguous()

    return edit


def state(**changes):
    """An edit of every quant_state; "gone" removes a key."""

    def change(blob):
        values = {**json.loads(bytes(blob.tolist())), **changes}
        text = json.dumps({key: value for key, value in values.items() if value != "gone"})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return each("weight.quant_state.bitsandbytes__nf4", change)


def only(*keys):
    """An edit of the config: the settings that have been there since the beginning."""
    return lambda settings: {key: settings[key] for key in keys}


def gone(tensor):
    return None


def same(settings):
    return settings


FIRST_8 = only("load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules")
FIRST_4 = only("load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules")
AGES = {
    "0.38: int8 without weight_format, and no quant_method": ("int8", each("weight_format", gone), FIRST_8),
    "weight_format of one dimension": ("int8", each("weight_format", lambda t: t.reshape(1)), same),
    "SCB of one row": ("int8", each("SCB", lambda t: t[None]), same),
    "SCB of one column": ("int8", each("SCB", lambda t: t[:, None]), same),
    "no quant_method": ("nf4-dq", each("none", gone), lambda s: {k: v for k, v in s.items() if k != "quant_method"}),
    "a config that names no type, whose default is fp4": ("nf4", each("none", gone), FIRST_4),
    "a config that names neither type nor double quantisation": ("nf4-dq", each("none", gone), FIRST_4),
    "a config without load_in_4bit but with _load_in_4bit": (
        "nf4",
        each("none", gone),
        only("_load_in_4bit", "_load_in_8bit", "quant_method", "bnb_4bit_quant_type", "llm_int8_skip_modules"),
    ),
    "a config with the dtype's full name": (
        "nf4",
        each("none", gone),
        lambda settings: {**settings, "bnb_4bit_compute_dtype": "torch.bfloat16"},
    ),
    "a config of the future": ("nf4", each("none", gone), lambda settings: {**settings, "bnb_4bit_new": 1}),
    "a block size that the config cannot say": ("b128", each("none", gone), same),
    "no codebook": ("nf4", each("weight.quant_map", gone), same),
    "no shape": ("nf4", state(shape="gone"), same),
    "no dtype": ("nf4", state(dtype="gone"), same),
    "no nested dtype": ("nf4-dq", state(nested_dtype="gone"), same),
    "a packed row instead of a column": ("nf4", each("weight", lambda t: t.reshape(1, -1)), same),
    "packed bytes as bfloat16": ("nf4", each("weight", lambda t: t.flatten().view(torch.bfloat16)[:, None]), same),
    "packed bytes as float32": ("nf4-dq", each("weight", lambda t: t.flatten().view(torch.float32)[:, None]), same),
    "packed bytes as int8": ("nf4", each("weight", lambda t: t.view(torch.int8)), same),
    "scales of one column": ("nf4", each("weight.absmax", lambda t: t[:, None]), same),
}


def aged(source, folder, edit, settings=same):
    """A copy of a checkpoint with other tensors, and other settings in its config."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    small_models.edit_config(folder, quantization_config=settings(stored))
    return folder


def saved_and_converted(folder, model, tmp_path):
    """``model``, loaded from ``folder``, comes back from every way to write it again."""
    for layout in ("bnbq", "bitsandbytes"):
        bnbq.from_pretrained(AUTO, folder, checkpoint_format=layout).save_pretrained(tmp_path / f"saved-{layout}")
        convert_checkpoint(folder, tmp_path / f"converted-{layout}", layout)
        for way in ("saved", "converted"):
            again = bnbq.from_pretrained(AUTO, tmp_path / f"{way}-{layout}")
            assert_same(again, model)
            assert {n: layer.format() for n, layer in layers(again).items()} == {
                n: layer.format() for n, layer in layers(model).items()
            }
            stored = json.loads((tmp_path / f"{way}-{layout}" / "config.json").read_text())
            assert stored["quantization_config"]["quant_method"] == layout


@pytest.mark.filterwarnings("error:.*bitsandbytes")
@pytest.mark.parametrize("age", AGES)
def test_age(sources, tmp_path, age):
    """Nothing is lost: the model is that of the present layout."""
    kind, edit, settings = AGES[age]
    folder = aged(sources / kind, tmp_path / "aged", edit, settings)
    model, wanted = bnbq.from_pretrained(AUTO, folder), bnbq.from_pretrained(AUTO, sources / kind)
    assert_same(model, wanted)
    assert len(layers(model)) == 14
    wanted = {key: value for key, value in KINDS[kind].items() if key != "bits"}
    assert all(layer.format().items() >= wanted.items() for layer in layers(model).values())
    saved_and_converted(folder, model, tmp_path)


def test_one_value(tmp_path):
    """bitsandbytes has stored a single scale as a scalar and as one element."""
    tiny = dict(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8)
    small_models.llama(tmp_path / "float", **tiny)
    config = BnbqConfig(blocksize=64, checkpoint_format="bitsandbytes")
    stream.quantize_checkpoint(tmp_path / "float", tmp_path / "now", config)
    tensors = load_file(tmp_path / "now" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight.absmax"].shape == (1,)
    scalar = each("weight.absmax", lambda t: t.reshape(()) if t.numel() == 1 else t)
    folder = aged(tmp_path / "now", tmp_path / "aged", scalar)
    model = bnbq.from_pretrained(AUTO, folder)
    assert_same(model, bnbq.from_pretrained(AUTO, tmp_path / "now"))
    saved_and_converted(folder, model, tmp_path)


def test_blocks_of_zeros_as_a_gpu_writes_them(sources, tmp_path):
    """Code 0 there, code 7 on a CPU, and a scale of zero either way: the weights are zero and the bytes stay."""

    def zeros(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][:64] = 0
        tensors["model.layers.0.mlp.up_proj.weight.absmax"][:2] = 0

    folder = aged(sources / "nf4", tmp_path / "aged", zeros)
    model = bnbq.from_pretrained(AUTO, folder)
    layer = model.model.layers[0].mlp.up_proj
    assert not layer.dequantize()[:2].any() and layer.dequantize()[2:].any() and not layer.qweight[:2].any()
    saved_and_converted(folder, model, tmp_path)


def transposed(tensors):
    """What a forward on a CPU with AVX-512 BF16 makes of the scales, which a save then writes."""
    for key in [key for key in tensors if key.endswith(".weight.absmax")]:
        n = json.loads(bytes(tensors[f"{key[:-7]}.quant_state.bitsandbytes__nf4"].tolist()))["shape"][0]
        tensors[key] = tensors[key].view(n, -1).t().bfloat16().contiguous()


SPOILT = {
    "after a forward on a CPU": ("nf4", transposed, "after a forward pass on a CPU", True),
    "after a forward on a CPU, nested": ("nf4-dq", state(nested_dtype="bfloat16"), "bfloat16 arithmetic", False),
    "another 8-bit map": ("nf4-dq", each("weight.nested_quant_map", lambda t: t * 0.5), "8-bit map of its own", False),
    "a map in half precision": ("nf4-dq", each("weight.nested_quant_map", lambda t: t.half()), "map of its own", False),
}


@pytest.mark.parametrize("age", SPOILT)
def test_spoilt(sources, tmp_path, age, capsys):
    """Read with one warning as bitsandbytes reads it, its settings kept, and written sound."""
    kind, edit, words, rounded = SPOILT[age]
    folder = aged(sources / kind, tmp_path / "aged", edit)
    with pytest.warns(UserWarning, match=words) as caught:
        model = bnbq.from_pretrained(AUTO, folder)
    assert len([warning for warning in caught if "layers" in str(warning.message)]) == 1
    whole = layers(bnbq.from_pretrained(AUTO, sources / kind))
    for name, layer in layers(model).items():
        assert layer.absmax.dtype == torch.float32 and not layer.double_quant
        assert torch.equal(layer.qweight, whole[name].qweight)
        if rounded:
            assert torch.equal(layer.absmax, whole[name].absmax.bfloat16().float())
    with pytest.warns(UserWarning, match=words):
        saved_and_converted(folder, model, tmp_path)
    capsys.readouterr()
    assert cli.main(["convert", str(folder), str(tmp_path / "float"), "--to", "bf16"]) == 0
    error = capsys.readouterr().err
    assert words in error and "14 layers in all" in error and error.count("\n") == 1


REFUSED = {
    "4 bits without a quant_state": ("nf4", each("weight.quant_state.bitsandbytes__nf4", gone), "quant_state"),
    "4 bits without any statistics": (
        "nf4",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if ".weight." in key],
        "U8 .* without scales",
    ),
    "two quant_states": (
        "nf4",
        lambda tensors: tensors.update({k[:-3] + "fp4": v.clone() for k, v in tensors.items() if k.endswith("__nf4")}),
        "2 quant_state tensors",
    ),
    "int8 in the tiles of a GPU": (
        "int8",
        each("weight_format", lambda t: torch.tensor(2, dtype=torch.uint8)),
        "weight_format is .2.; only 0",
    ),
    "int8 without SCB": ("int8", each("SCB", gone), "no SCB"),
    "scales of another layer": ("int8", each("SCB", lambda t: t[:-1]), "SCB is .*wanted (64|128|32) floats"),
    "a codebook of its own": ("nf4", each("weight.quant_map", lambda t: t * 1.01), "quant_map is not the nf4 codebook"),
}


@pytest.mark.parametrize("age", REFUSED)
def test_refused(sources, tmp_path, age):
    """By name, by loading and by converting, and nothing is written."""
    kind, edit, words = REFUSED[age]
    folder = aged(sources / kind, tmp_path / "aged", edit)
    for act in (bnbq.from_pretrained, lambda _, folder: convert_checkpoint(folder, tmp_path / "out", "bnbq")):
        with pytest.raises(ValueError, match=rf"model\.layers\.\d.*{words}"):
            act(AUTO, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["aged"]


def test_layers_of_two_formats(sources, tmp_path):
    """bitsandbytes' files describe each layer, ours all at once: written in theirs, refused in ours."""
    other = load_file(sources / "nf4-dq" / "model.safetensors")
    prefix = "model.layers.1.mlp.up_proj.weight"
    mix = lambda tensors: tensors.update({k: v for k, v in other.items() if k.startswith(prefix)})  # noqa: E731
    folder = aged(sources / "nf4", tmp_path / "mixed", mix)
    model = bnbq.from_pretrained(AUTO, folder)
    assert [name for name, layer in layers(model).items() if layer.double_quant] == [prefix.removesuffix(".weight")]
    model.save_pretrained(tmp_path / "saved")
    convert_checkpoint(folder, tmp_path / "converted", "bitsandbytes")
    for way in ("saved", "converted"):
        assert_same(bnbq.from_pretrained(AUTO, tmp_path / way), model)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj is .*all layers at once"):
        bnbq.from_pretrained(AUTO, folder, checkpoint_format="bnbq").save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj is .*all layers at once"):
        convert_checkpoint(folder, tmp_path / "out", "bnbq")
    assert not list(tmp_path.glob("out/*.safetensors"))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_files(sources, tmp_path, kind):
    """pytorch_model.bin: its layers are in the format of the first, which it tells before they are made."""
    folder = pickled(aged(sources / kind, tmp_path / "aged", each("none", gone)))
    model = bnbq.from_pretrained(AUTO, folder)
    assert_same(model, bnbq.from_pretrained(AUTO, sources / kind))
    model.save_pretrained(tmp_path / "saved")
    assert_same(bnbq.from_pretrained(AUTO, tmp_path / "saved"), model)
    with pytest.raises(ValueError, match="only safetensors are read"):
        convert_checkpoint(folder, tmp_path / "out", "bnbq")


@pytest.mark.parametrize("layout", ["row", "col_turing", "col_ampere"])
def test_pickled_files_of_039_to_0430(sources, tmp_path, layout):
    """weight_format was a string then, so the files could only be pickled."""
    folder = aged(sources / "int8", tmp_path / "aged", each("none", gone))
    tensors = load_file(folder / "model.safetensors")
    tensors.update({key: layout for key in tensors if key.endswith("weight_format")})
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    if layout == "row":
        assert_same(bnbq.from_pretrained(AUTO, folder), bnbq.from_pretrained(AUTO, sources / "int8"))
    else:
        with pytest.raises(ValueError, match=rf"model.layers.0.\S+: weight_format is '{layout}'; only .*row"):
            bnbq.from_pretrained(AUTO, folder)


def test_pickled_state_dict_of_039_to_0430(sources):
    tensors = load_file(sources / "int8" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj."
    state = {key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)}
    layer = bnbq.nn.Linear8bitLt(64, 128, bias=False)
    layer.load_state_dict({**state, "weight_format": "row"})
    assert torch.equal(layer.qweight, state["weight"]) and torch.equal(layer.absmax, state["SCB"])
    with pytest.raises(RuntimeError, match="weight_format is 'col32'"):
        layer.load_state_dict({**state, "weight_format": "col32"})


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "b128"])
def test_pickled_files_whose_config_says_something_else(sources, tmp_path, kind):
    """One without a type means fp4, and none has a block size: the files know better."""
    folder = pickled(aged(sources / kind, tmp_path / "aged", each("none", gone), FIRST_4))
    assert_same(bnbq.from_pretrained(AUTO, folder), bnbq.from_pretrained(AUTO, sources / kind))


def test_pickled_layers_of_two_formats(sources, tmp_path):
    other = load_file(sources / "b128" / "model.safetensors")
    prefix = "model.layers.1.mlp.up_proj.weight"

    def mix(tensors):
        tensors.pop(f"{prefix}.quant_state.bitsandbytes__nf4")
        tensors.update({key: value for key, value in other.items() if key.startswith(prefix)})

    folder = pickled(aged(sources / "nf4", tmp_path / "mixed", mix))
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: .*'fp4', its first layer .*save the checkpoint"):
        bnbq.from_pretrained(AUTO, folder)


def test_pickled_files_from_before_torch_16(sources, tmp_path):
    """They cannot be mapped: the config is believed, and compared."""
    folder = aged(sources / "nf4", tmp_path / "aged", each("none", gone))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_same(bnbq.from_pretrained(AUTO, folder), bnbq.from_pretrained(AUTO, sources / "nf4"))
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    small_models.edit_config(folder, quantization_config=FIRST_4(stored))
    with pytest.raises(ValueError, match=r"quant_type='nf4', its first layer \(or its config\) quant_type='fp4'"):
        bnbq.from_pretrained(AUTO, folder)
