"""Stock Transformers calls: quantise while loading, generate, save and load, in every order, on every device map."""

import copy
import json
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn  # noqa: E402
from hf import AUTO, IDS, SPLIT, assert_same, compared, file_tensors, layers, logits, quantized  # noqa: E402

SETTINGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
OWN_SETTINGS = {"int4-b32": dict(quant_type="int4", blocksize=32), "int8-b32": dict(bits=8, blocksize=32)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with a float checkpoint in four shards."""
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", shard="90KB")


# ------------------------------------------------------------------ registration


@pytest.mark.parametrize(
    "order",
    [
        "import bnbq; assert not {'torch', 'transformers'} & {*sys.modules}; import importlib.util;"
        "importlib.util.find_spec('transformers.quantizers'); from transformers.quantizers import auto",
        "from transformers.quantizers import auto; import bnbq",
        "import transformers, bnbq; transformers.PreTrainedModel; from transformers.quantizers import auto",
    ],
)
def test_registers_in_either_order(order):
    code = (
        f"import sys; {order}\n"
        "import bnbq; bnbq.integrations.install()\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['bnbq'].__name__ == 'BnbqQuantizer'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['bnbq'] is bnbq.BnbqConfig\n"
        "assert not any('bnbq' in type(f).__module__ for f in sys.meta_path), sys.meta_path"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", SETTINGS)
def test_stock_call_gives_the_bytes_of_quantising_each_layer(llama, name):
    model = quantized(llama, SETTINGS[name], device_map="auto")
    dense = AUTO.from_pretrained(llama)
    found = layers(model)
    assert len(found) == 14 and "lm_head" not in found and model.lm_head.weight.dtype == torch.bfloat16
    for path, layer in found.items():
        assert type(layer).__name__ == ("Linear8bitLt" if name == "int8" else "Linear4bit")
        settings = model.config.quantization_config.layer_settings()
        wanted = type(layer).from_linear(dense.get_submodule(path), **settings)
        for leaf in layer.packed_spec():
            assert torch.equal(getattr(layer, leaf), getattr(wanted, leaf)), (path, leaf)
            assert not getattr(layer, leaf).requires_grad
        assert layer.weight_dtype == torch.bfloat16
    error = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert error < (0.03 if name == "int8" else 0.2)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model, "is_loaded_in_4bit") and not hasattr(model, "is_loaded_in_8bit")
    assert model.is_quantized and model.quantization_method == "bnbq"
    assert (
        model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
    )
    saved = json.loads(model.config.to_json_string())["quantization_config"]
    assert saved["quant_method"] == "bnbq" and not any(key.startswith("load_in") for key in saved)


def test_loading_is_exact_where_it_counts(llama):
    """The dtype asked for applies before quantising, and get_memory_footprint counts every packed byte."""
    model = quantized(llama, SETTINGS["nf4"], dtype=torch.float32)
    dense = AUTO.from_pretrained(llama, dtype=torch.float32)
    wanted = nn.Linear4bit.from_linear(dense.model.layers[0].mlp.up_proj)
    assert torch.equal(model.model.layers[0].mlp.up_proj.absmax, wanted.absmax)
    assert model.get_memory_footprint() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert model.model.layers[0].mlp.up_proj.qweight.nbytes == 128 * 64 // 2


DEVICE_MAPS = {
    "none": None,
    "auto": "auto",
    "cpu": "cpu",
    "dict": {"": "cpu"},
    "disk": {"": "disk"},
    "split": SPLIT,
}


@pytest.mark.parametrize("place", DEVICE_MAPS)
@pytest.mark.parametrize("name", ["nf4-dq", "int8"])
def test_every_device_map_gives_the_same_model(llama, tmp_path, name, place):
    """On the fly, from a native checkpoint and from bitsandbytes' format; "disk" computes with packed bytes too."""
    where = dict(device_map=DEVICE_MAPS[place])
    wanted = quantized(llama, SETTINGS[name])
    quantized(llama, dict(SETTINGS[name], checkpoint_format="bitsandbytes")).save_pretrained(tmp_path / "bitsandbytes")
    wanted.save_pretrained(tmp_path / "bnbq")
    expected = logits(wanted)
    for source in ("on the fly", "bnbq", "bitsandbytes"):
        where["offload_folder"] = tmp_path / f"disk {source}"
        if source == "on the fly":
            model = quantized(llama, SETTINGS[name], **where)
        else:
            model = bnbq.from_pretrained(
                AUTO, tmp_path / source, compute_dtype=SETTINGS[name].get("bnb_4bit_compute_dtype"), **where
            )
        assert len(layers(model)) == 14
        assert torch.equal(logits(model), expected), source
        if place == "disk":
            assert all(layer.qweight.device.type == "meta" for layer in layers(model).values())
        model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
        again = bnbq.from_pretrained(
            AUTO, tmp_path / "again", compute_dtype=SETTINGS[name].get("bnb_4bit_compute_dtype")
        )
        assert_same(again, wanted)


def test_generate_and_pipeline(llama):
    model = quantized(llama, SETTINGS["nf4-dq"], device_map="auto")
    greedy = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert greedy.shape == (1, 16)
    step = IDS
    for _ in range(6):
        step = torch.cat([step, logits(model, step)[:, -1:].argmax(-1)], 1)
        if step[0, -1] == model.config.eos_token_id:
            break
    assert torch.equal(greedy[:, : step.shape[1]], step)
    torch.manual_seed(0)
    one = model.generate(IDS, max_new_tokens=6, do_sample=True, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(one, model.generate(IDS, max_new_tokens=6, do_sample=True, top_k=20))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert len(pipe("once upon", max_new_tokens=4, do_sample=False)[0]["generated_text"]) > len("once upon")


def test_not_finite_weights_are_named(llama, tmp_path):
    for value in (float("nan"), float("inf")):
        tensors = file_tensors(llama)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        folder = tmp_path / str(value)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
        for settings in (SETTINGS["nf4"], SETTINGS["int8"]):
            with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*(nan|inf)"):
                quantized(folder, settings)


def test_skip_and_include(llama):
    skipped = quantized(llama, dict(load_in_8bit=True, llm_int8_skip_modules=["down_proj"]))
    assert len(layers(skipped)) == 12 and "lm_head" not in layers(skipped)
    everything = quantized(llama, dict(bits=4, include_modules=["lm_head"]))
    assert "lm_head" in layers(everything)


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("name", [*SETTINGS, *OWN_SETTINGS])
def test_save_and_load_any_number_of_times(llama, tmp_path, name):
    """One file and shards alternate; the files' tensors never change."""
    model = quantized(llama, {**SETTINGS, **OWN_SETTINGS}[name])
    expected, first = logits(model), None
    for turn in range(3):
        folder = tmp_path / str(turn)
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if turn % 2 else {}))
        assert (folder / "model.safetensors.index.json").exists() == bool(turn % 2)
        tensors = file_tensors(folder)
        first = first or tensors
        assert tensors.keys() == first.keys() and all(torch.equal(tensors[k], first[k]) for k in first)
        again = AUTO.from_pretrained(folder)
        assert_same(again, model)
        assert torch.equal(logits(again), expected)
        model = again
    model.save_pretrained(folder)  # over itself
    assert_same(AUTO.from_pretrained(folder), model)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "int8"])
def test_formats_convert_into_each_other(llama, tmp_path, name):
    """bnbq -> bitsandbytes -> bitsandbytes -> bnbq: the packed bytes and scales stay the same bits."""
    model = quantized(llama, SETTINGS[name])
    model.save_pretrained(tmp_path / "0")
    steps = ["bitsandbytes", "bitsandbytes", "bnbq", "bnbq"]
    for turn, layout in enumerate(steps):
        loaded = bnbq.from_pretrained(AUTO, tmp_path / str(turn), checkpoint_format=layout)
        assert_same(loaded, model)
        loaded.save_pretrained(tmp_path / str(turn + 1), max_shard_size="50KB")
        config = json.loads((tmp_path / str(turn + 1) / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == layout
        keys = file_tensors(tmp_path / str(turn + 1))
        assert any(key.endswith(".qweight") for key in keys) == (layout == "bnbq")
        assert ("load_in_4bit" in config) == (layout == "bitsandbytes")
    assert_same(AUTO.from_pretrained(tmp_path / "4"), model)


def test_save_without_the_original_format(llama, tmp_path):
    model = quantized(llama, dict(SETTINGS["nf4-dq"], checkpoint_format="bitsandbytes"))
    model.save_pretrained(tmp_path / "native names", save_original_format=False)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path / "native names"), model)


def test_a_pushed_model_and_a_saved_one_say_import_bnbq(llama, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    from bnbq.checkpoint import CARD_LINE

    model = quantized(llama, SETTINGS["nf4"])
    model.save_pretrained(tmp_path / "saved")
    assert "import bnbq" in (tmp_path / "saved" / "README.md").read_text()
    (tmp_path / "saved" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"
    pushed = {}

    class Hub:  # what push_to_hub needs of the network
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, operations, **kwargs):
            pushed.update({o.path_in_repo: o.path_or_fileobj for o in operations})
            pushed["card"] = ModelCard.load(pushed["README.md"])

    from transformers.utils import hub

    def card(repo_id, tags=None, token=None):
        return ModelCard(f"---\ntags: {json.dumps(tags)}\n---\n\n# As Transformers makes it\n")

    monkeypatch.setattr(hub, "hf_api", lambda *a, **k: Hub())
    monkeypatch.setattr(hub, "create_and_tag_model_card", card)
    model.push_to_hub("somebody/model")
    assert {"config.json", "model.safetensors", "README.md"} <= set(pushed)
    assert CARD_LINE in pushed["card"].text and "As Transformers makes it" in pushed["card"].text
    assert "bnbq" in pushed["card"].data.tags
    pickle.loads(pickle.dumps(model._upload_modified_files))


def test_copies_and_pickles_save_and_compute_alike(llama, tmp_path):
    model = quantized(llama, dict(SETTINGS["nf4-dq"], checkpoint_format="bitsandbytes"))
    expected = logits(model)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert torch.equal(logits(twin), expected)
        twin.save_pretrained(tmp_path / str(number))
        assert_same(bnbq.from_pretrained(AUTO, tmp_path / str(number)), model)


def test_quantize_model_saves_like_loading(llama, tmp_path):
    for layout in ("bnbq", "bitsandbytes"):
        settings = dict(SETTINGS["nf4-dq"], checkpoint_format=layout)
        model = AUTO.from_pretrained(llama)
        bnbq.quantize_model(model, bnbq.BnbqConfig(**settings))
        assert_same(model, quantized(llama, settings))
        model.save_pretrained(tmp_path / layout)
        assert_same(bnbq.from_pretrained(AUTO, tmp_path / layout), model)


# ------------------------------------------------------------------ other doors


def test_other_ways_to_hand_over_tensors(llama, tmp_path):
    """A .bin file, a state dict, a base model's checkpoint: no headers to look at, or other names."""
    model = quantized(llama, SETTINGS["nf4-dq"])
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(AUTO.from_pretrained(tmp_path), model)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=dict(state)), model)
    del state["model.layers.0.mlp.up_proj.absmax2"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.absmax2 was not in the checkpoint"):
        AUTO.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "causal")
    body = transformers.AutoModel.from_pretrained(tmp_path / "causal")
    assert_same(body, model.model)
    body.save_pretrained(tmp_path / "body")
    assert_same(transformers.AutoModel.from_pretrained(tmp_path / "body"), body)
    head = AUTO.from_pretrained(tmp_path / "body")
    assert_same(head.model, body)
    small = AUTO.from_pretrained(tmp_path / "causal", num_hidden_layers=1)
    assert len(layers(small)) == 7


def test_dequantize(llama):
    model = quantized(llama, SETTINGS["nf4-dq"])
    wanted = {name: layer.dequantize() for name, layer in layers(model).items()}
    model.dequantize()
    assert not layers(model) and not model.is_quantized and not hasattr(model, "hf_quantizer")
    for name, weight in wanted.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert logits(model).isfinite().all()
    assert "_upload_modified_files" not in vars(model) and "bnbq" not in model.model_tags


# ------------------------------------------------------------------ bnbq.from_pretrained


def test_keyword_style(llama, tmp_path):
    four, eight = quantized(llama, SETTINGS["nf4"]), quantized(llama, SETTINGS["int8"])
    assert_same(bnbq.from_pretrained(AUTO, llama, load_in_8bit=True, device_map="auto"), eight)
    assert_same(
        bnbq.from_pretrained(transformers.LlamaForCausalLM, llama, load_in_4bit=True, dtype=torch.bfloat16), four
    )
    foreign = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    model = bnbq.from_pretrained(AUTO, llama, quantization_config=foreign)
    assert_same(model, four)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float16
    assert_same(bnbq.from_pretrained(AUTO, llama, quantization_config=foreign.to_dict()), four)
    for off in ({}, {"load_in_8bit": False}, {"load_in_4bit": None}):
        assert not layers(bnbq.from_pretrained(AUTO, llama, **off))
    assert_same(bnbq.from_pretrained(AUTO, llama, bits=4, load_in_8bit=False), four)
    four.save_pretrained(tmp_path)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path), four)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path, load_in_4bit=True, use_cache=False), four)
    model = bnbq.from_pretrained(AUTO, tmp_path, compute_dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    model = bnbq.from_pretrained(AUTO, tmp_path, activations="int8")
    assert_same(model, four)
    assert model.model.layers[0].mlp.up_proj.activations == "int8"
    model.save_pretrained(tmp_path / "again")
    again = bnbq.from_pretrained(AUTO, tmp_path / "again")
    assert again.model.layers[0].mlp.up_proj.activations == "int8" and torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(four))
    with pytest.raises(ValueError, match="quantised to 4 bits"):
        bnbq.from_pretrained(AUTO, tmp_path, load_in_8bit=True)
    with pytest.raises(TypeError, match="blocksiz"):
        bnbq.BnbqConfig(blocksiz=64)


def test_checkpoint_metadata_is_what_it_says(llama, tmp_path):
    quantized(llama, SETTINGS["nf4"]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        packed = [name for name in file.offset_keys() if name.endswith(("qweight", "absmax"))]
    assert metadata["format"] == "pt" and {f"crc32:{name}" for name in packed} <= set(metadata)


def test_stock_config_argument_beside_a_packed_checkpoint(llama, tmp_path):
    """Transformers keeps the checkpoint's settings and warns; a loaded model's config object works as config=."""
    model = quantized(llama, SETTINGS["nf4"])
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = quantized(tmp_path, SETTINGS["nf4-dq"])
    assert_same(again, model)
    assert_same(AUTO.from_pretrained(tmp_path, config=model.config), model)


def test_every_packed_tensor_is_verified(llama, tmp_path, monkeypatch):
    model = quantized(llama, SETTINGS["nf4-dq"])
    model.save_pretrained(tmp_path / "causal")
    counts = compared(monkeypatch)
    AUTO.from_pretrained(tmp_path / "causal")
    transformers.AutoModel.from_pretrained(tmp_path / "causal")  # other names: no "model." in front
    assert counts == [56, 56]


def test_adapters_directory(llama, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AUTO.from_pretrained(llama), config).save_pretrained(tmp_path)
    model = bnbq.from_pretrained(AUTO, tmp_path, load_in_4bit=True)
    assert len(layers(model)) == 14 and any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.skipif(bool(bnbq._bnbq.build_info().get("cuda")), reason="a build with CUDA")
def test_a_gpu_needs_a_build_with_cuda(llama):
    for device_map in ({"": 0}, {"model": "cuda:0", "lm_head": "cpu"}):
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            quantized(llama, SETTINGS["nf4"], device_map=device_map)


def test_settings_can_be_used_twice(llama, tmp_path):
    """Saving for bitsandbytes spells out what is skipped: not in the caller's object."""
    small_models.bert(tmp_path / "bert")
    config = bnbq.BnbqConfig(bits=8, checkpoint_format="bitsandbytes", include_modules=["lm_head"])
    before = config.to_native_dict()
    AUTO.from_pretrained(llama, quantization_config=config).save_pretrained(tmp_path / "one")
    assert config.to_native_dict() == before
