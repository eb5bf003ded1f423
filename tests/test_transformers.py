"""Stock Transformers calls: quantise while loading, generate, save and load again, in every order and on every device map."""

import copy
import json
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import small_models  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
from bnbq import nn  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
IDS = torch.arange(1, 11)[None]
QUANTIZED = (nn.Linear4bit, nn.Linear8bitLt)
SETTINGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
OWN_SETTINGS = {"int4-b32": dict(quant_type="int4", blocksize=32), "int8-b32": dict(bits=8, blocksize=32)}


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with a float checkpoint in four shards."""
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", shard="90KB")


def quantized(path, settings, **kwargs):
    return AUTO.from_pretrained(path, quantization_config=bnbq.BnbqConfig(**settings), **kwargs)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def assert_same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def file_tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# ------------------------------------------------------------------ registration

@pytest.mark.parametrize("order", [
    "import bnbq; assert 'transformers' not in sys.modules and 'torch' not in sys.modules; from transformers.quantizers import auto",
    "from transformers.quantizers import auto; import bnbq",
    "import transformers, bnbq; transformers.PreTrainedModel; from transformers.quantizers import auto",
])
def test_registers_in_either_order(order):
    code = (f"import sys; {order}\n"
            "import bnbq; bnbq.integrations.install()\n"
            "assert auto.AUTO_QUANTIZER_MAPPING['bnbq'].__name__ == 'BnbqQuantizer'\n"
            "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['bnbq'] is bnbq.BnbqConfig\n"
            "assert not any('bnbq' in type(f).__module__ for f in sys.meta_path), sys.meta_path")
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
    assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable and model.hf_quantizer.is_compileable
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
    "none": None, "auto": "auto", "cpu": "cpu", "dict": {"": "cpu"}, "disk": {"": "disk"},
    "split": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"},
}


@pytest.mark.parametrize("place", DEVICE_MAPS)
@pytest.mark.parametrize("name", ["nf4-dq", "int8"])
def test_every_device_map_gives_the_same_model(llama, tmp_path, name, place):
    """On the fly, from a native checkpoint and from one in bitsandbytes' format; "disk" computes with packed bytes too."""
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
            model = bnbq.from_pretrained(AUTO, tmp_path / source, compute_dtype=SETTINGS[name].get("bnb_4bit_compute_dtype"), **where)
        assert len(layers(model)) == 14
        assert torch.equal(logits(model), expected), source
        if place == "disk":
            assert all(layer.qweight.device.type == "meta" for layer in layers(model).values())
        model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
        again = bnbq.from_pretrained(AUTO, tmp_path / "again", compute_dtype=SETTINGS[name].get("bnb_4bit_compute_dtype"))
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
    assert torch.equal(greedy[:, :step.shape[1]], step)
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


# ------------------------------------------------------------------ other architectures

def build(config_class, model_class, folder, dtype=torch.float32, **settings):
    torch.manual_seed(3)
    model = model_class(config_class(**settings)).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def close(one, other, bound):
    return (one - other).norm() / other.norm() < bound


@pytest.mark.parametrize("bits", [4, 8])
def test_gpt2_stores_its_weights_transposed(tmp_path, bits):
    small_models.gpt2(tmp_path / "float")
    dense = AUTO.from_pretrained(tmp_path / "float")
    model = quantized(tmp_path / "float", dict(bits=bits))
    assert len(layers(model)) == 8
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert torch.equal(layer.qweight, type(layer).from_linear(dense.transformer.h[0].mlp.c_fc).qweight)
    assert close(logits(model), logits(dense), 0.2)
    model.save_pretrained(tmp_path / "packed")
    again = AUTO.from_pretrained(tmp_path / "packed")
    assert_same(again, model)
    back = again.dequantize()
    assert type(back.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert close(logits(back), logits(model), 1e-5 if bits == 4 else 0.02)
    back.save_pretrained(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "back")), logits(back))
    assert torch.equal(back.lm_head.weight, back.transformer.wte.weight)


def test_t5_and_bert(tmp_path):
    t5 = build(transformers.T5Config, transformers.T5ForConditionalGeneration, tmp_path / "t5", d_model=64, d_kv=16, d_ff=128, num_layers=2,
               num_heads=4, vocab_size=64, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", quantization_config=bnbq.BnbqConfig(load_in_8bit=True))
    assert len(layers(model)) > 10 and not any("lm_head" in name for name in layers(model))
    assert close(model(IDS, decoder_input_ids=IDS).logits, t5(IDS, decoder_input_ids=IDS).logits, 0.05)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] <= 5
    model.save_pretrained(tmp_path / "t5q")
    assert_same(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5q"), model)

    small_models.bert(tmp_path / "bert")
    dense = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert", quantization_config=bnbq.BnbqConfig())
    assert close(logits(model), logits(dense), 0.3) and model.bert.encoder.layer[0].attention.self.query.bias is not None
    model.save_pretrained(tmp_path / "bertq")
    assert_same(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bertq"), model)


def test_new_heads_stay_float_and_are_initialised(tmp_path):
    """A layer that the checkpoint does not have is no reason to refuse it, on the fly or quantised already."""
    small_models.bert(tmp_path / "bert")
    config = bnbq.BnbqConfig(load_in_8bit=True)
    body = transformers.AutoModel.from_pretrained(tmp_path / "bert", quantization_config=config)  # the MLM model has no pooler
    assert type(body.pooler.dense) is torch.nn.Linear and body.pooler.dense.weight.std() > 0
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert", quantization_config=config)
    masked.save_pretrained(tmp_path / "packed")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert type(again.pooler.dense) is torch.nn.Linear and "pooler.dense.weight" in info["missing_keys"]
    name = "encoder.layer.1.output.dense"
    assert torch.equal(again.get_submodule(name).qweight, masked.bert.get_submodule(name).qweight)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    assert type(classifier.classifier) is torch.nn.Linear and classifier.classifier.weight.shape == (3, 64)


def test_renamed_and_fused_checkpoints(tmp_path):
    """A model whose checkpoints fuse projections and rename layers: packed, saved, and float tensors are not lost."""
    config = transformers.AutoConfig.for_model("hrm_text", hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4,
                                               head_dim=16, vocab_size=64, num_layers_per_stack=1, num_hidden_layers=2)
    torch.manual_seed(0)
    dense = AUTO.from_config(config).eval()
    dense.save_pretrained(tmp_path / "float")
    stored = file_tensors(tmp_path / "float")
    assert any("gate_up_proj" in name for name in stored), list(stored)[:20]
    dense = AUTO.from_pretrained(tmp_path / "float")
    for settings in (dict(bits=4), dict(bits=8, skip_modules=["up_proj"]), dict(bits=4, checkpoint_format="bitsandbytes")):
        model, info = quantized(tmp_path / "float", settings, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert len(layers(model)) >= 6
        for name, layer in layers(model).items():
            wanted = type(layer).from_linear(dense.get_submodule(name))
            assert torch.equal(layer.qweight, wanted.qweight), name
        for name, parameter in model.named_parameters():
            if name in dict(dense.named_parameters()):
                assert torch.equal(parameter, dense.get_parameter(name)), name
        model.save_pretrained(tmp_path / "packed")
        again = bnbq.from_pretrained(AUTO, tmp_path / "packed")
        assert_same(again, model)
        again.save_pretrained(tmp_path / "again")
        assert_same(bnbq.from_pretrained(AUTO, tmp_path / "again"), model)


def test_renamed_keys_of_layers_that_stay_float(llama, tmp_path):
    """key_mapping renames every key: a converter that caught all weights would lose embeddings and norms."""
    tensors = {f"old.{name}": tensor for name, tensor in file_tensors(llama).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    model, info = quantized(tmp_path, SETTINGS["nf4"], key_mapping={r"^old\.": ""}, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model, quantized(llama, SETTINGS["nf4"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_head(tmp_path, bits):
    small_models.llama(tmp_path / "float", tie_word_embeddings=True)
    model = quantized(tmp_path / "float", dict(bits=bits))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    assert "lm_head.weight" not in file_tensors(tmp_path / "packed")
    again = AUTO.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_odd_sizes(tmp_path):
    """K % blocksize != 0: flat tensors, the same in both formats."""
    small_models.llama(tmp_path / "float", hidden_size=72, intermediate_size=100, num_attention_heads=4, head_dim=18)
    for settings in (dict(bits=4), dict(bits=4, double_quant=True), dict(bits=8)):
        model = quantized(tmp_path / "float", settings)
        for layout in ("bnbq", "bitsandbytes"):
            model.config.quantization_config.checkpoint_format = layout
            model.hf_quantizer.keep_for_saving(model)
            model.save_pretrained(tmp_path / layout)
            assert_same(bnbq.from_pretrained(AUTO, tmp_path / layout), model)


def test_dequantize(llama):
    model = quantized(llama, SETTINGS["nf4-dq"])
    wanted = {name: layer.dequantize() for name, layer in layers(model).items()}
    model.dequantize()
    assert not layers(model) and not model.is_quantized and not hasattr(model, "hf_quantizer")
    for name, weight in wanted.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert logits(model).isfinite().all()


# ------------------------------------------------------------------ bnbq.from_pretrained

def test_keyword_style(llama, tmp_path):
    four, eight = quantized(llama, SETTINGS["nf4"]), quantized(llama, SETTINGS["int8"])
    assert_same(bnbq.from_pretrained(AUTO, llama, load_in_8bit=True, device_map="auto"), eight)
    assert_same(bnbq.from_pretrained(transformers.LlamaForCausalLM, llama, load_in_4bit=True, dtype=torch.bfloat16), four)
    foreign = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    model = bnbq.from_pretrained(AUTO, llama, quantization_config=foreign)
    assert_same(model, four)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float16
    assert_same(bnbq.from_pretrained(AUTO, llama, quantization_config=foreign.to_dict()), four)
    plain = bnbq.from_pretrained(AUTO, llama)
    assert not layers(plain)
    four.save_pretrained(tmp_path)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path), four)
    assert_same(bnbq.from_pretrained(AUTO, tmp_path, load_in_4bit=True, use_cache=False), four)
    model = bnbq.from_pretrained(AUTO, tmp_path, compute_dtype=torch.float32)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    with pytest.raises(ValueError, match="quantised to 4 bits"):
        bnbq.from_pretrained(AUTO, tmp_path, load_in_8bit=True)
    with pytest.raises(TypeError, match="blocksiz"):
        bnbq.BnbqConfig(blocksiz=64)


def test_checkpoint_metadata_is_what_it_says(llama, tmp_path):
    quantized(llama, SETTINGS["nf4"]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        packed = [name for name in file.keys() if name.endswith(("qweight", "absmax"))]
    assert metadata["format"] == "pt" and {f"crc32:{name}" for name in packed} <= set(metadata)


def test_stock_config_argument_beside_a_packed_checkpoint(llama, tmp_path):
    """Transformers keeps the checkpoint's settings and warns; a loaded model's config object works as config=."""
    model = quantized(llama, SETTINGS["nf4"])
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = quantized(tmp_path, SETTINGS["nf4-dq"])
    assert_same(again, model)
    assert_same(AUTO.from_pretrained(tmp_path, config=model.config), model)
