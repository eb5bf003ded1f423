"""bnbq.plan: the sizes and devices of a model before it is loaded are those of the model loaded."""

from collections import Counter

import pytest
import torch
import transformers

import bnbq
import small_models
from adapters import AUTO
from bnbq import placement
from bnbq.errors import UserError
from bnbq.report import size_of, tensors_of

CONFIGS = {
    "nf4": {},
    "nf4-dq": {"double_quant": True},
    "int8": {"bits": 8},
    "embeddings": {"quantize_embeddings": True},
    "skip": {"skip_modules": ["0"]},  # the first block, whatever it is called
}


def fp32_kept(folder):
    """A T5: fp16, but for what its class keeps in float32; embeddings tied three times."""
    torch.manual_seed(4)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=259, feed_forward_proj="gated-gelu"
    )
    return small_models.save(transformers.T5ForConditionalGeneration(config).to(torch.float16), folder)


MODELS = {
    "llama": (small_models.llama, AUTO),
    "llama-shards": (lambda folder: small_models.llama(folder, shard="100KB"), AUTO),
    "llama-tied": (lambda folder: small_models.llama(folder, tie_word_embeddings=True), AUTO),
    "gpt2": (small_models.gpt2, AUTO),
    "bert": (small_models.bert, transformers.AutoModelForMaskedLM),
    "mixture": (small_models.mixture, AUTO),
    "t5": (fp32_kept, transformers.AutoModelForSeq2SeqLM),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """(folder, auto class) of a float model."""
    write, kind = MODELS[request.param]
    return write(tmp_path_factory.mktemp("models") / request.param), kind


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama")


def sizes(model):
    """Bytes of each module's own tensors, tied ones with the first."""
    result = Counter()
    for name, tensor in tensors_of(model):
        result[name.rpartition(".")[0]] += size_of(tensor)
    return dict(result)


def planned_sizes(plan):
    result = Counter()
    for module in plan.modules:
        result[module.name] += module.bytes
    return dict(result)


def load(kind, folder, settings, **arguments):
    return kind.from_pretrained(folder, quantization_config=bnbq.BnbqConfig(**settings), **arguments)


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_model_loaded(checkpoint, name):
    folder, kind = checkpoint
    plan = bnbq.plan(folder, {"cpu": "1GB"}, bnbq.BnbqConfig(**CONFIGS[name]))
    model = load(kind, folder, CONFIGS[name])
    assert planned_sizes(plan) == sizes(model)
    assert plan.bytes == model.get_memory_footprint() == bnbq.get_memory_footprint(model)
    assert plan.device_map == {"": "cpu"} and plan.fits
    if name == "skip":
        assert plan.bytes > bnbq.plan(folder, {"cpu": "1GB"}).bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_dtype_and_counts_are_those_of_the_float_model(checkpoint, name):
    """Of the model and of each model in it; what is counted are logical parameters."""
    folder, kind = checkpoint
    dense, model = kind.from_pretrained(folder), load(kind, folder, CONFIGS[name])
    for part in [n for n, m in dense.named_modules() if isinstance(m, transformers.PreTrainedModel)]:
        one, other = dense.get_submodule(part), model.get_submodule(part)
        assert other.dtype == one.dtype, part
        assert bnbq.count_parameters(other) == sum(p.numel() for p in one.parameters()), part


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "embeddings"])
def test_of_a_quantised_checkpoint(checkpoint, tmp_path, name):
    folder, kind = checkpoint
    model = load(kind, folder, CONFIGS[name])
    model.save_pretrained(tmp_path / "saved")
    assert planned_sizes(bnbq.plan(tmp_path / "saved", {"cpu": "1GB"})) == sizes(model)


@pytest.mark.parametrize("settings", [{"double_quant": True}, {"bits": 8}], ids=str)
def test_of_a_bitsandbytes_checkpoint(llama, tmp_path, settings):
    load(AUTO, llama, {"checkpoint_format": "bitsandbytes", **settings}).save_pretrained(tmp_path / "saved")
    plan = bnbq.plan(str(tmp_path / "saved"), {"cpu": "1GB"})
    assert planned_sizes(plan) == sizes(bnbq.from_pretrained(AUTO, tmp_path / "saved"))


def test_a_new_head_is_planned_in_float(tmp_path):
    """As it is loaded: no file has a weight to quantise."""
    folder = small_models.llama(tmp_path / "llama")
    small_models.edit_config(folder, architectures=["LlamaForSequenceClassification"])
    settings = {"include_modules": ["score"]}
    plan = bnbq.plan(folder, {"cpu": "1GB"}, bnbq.BnbqConfig(**settings))
    model = load(transformers.AutoModelForSequenceClassification, folder, settings)
    assert planned_sizes(plan) == sizes(model) and planned_sizes(plan)["score"] == 2 * 64 * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_of_a_live_model(llama, name):
    dense = AUTO.from_pretrained(llama)
    before = {n: (id(p), p.detach().clone()) for n, p in dense.named_parameters()}
    config = bnbq.BnbqConfig(**CONFIGS[name])
    plan = bnbq.plan(dense, {"cpu": "1GB"}, config)
    for n, p in dense.named_parameters():  # as it was
        assert id(p) == before[n][0] and torch.equal(p, before[n][1])
    with torch.device("meta"):
        empty = type(dense)._from_config(dense.config, dtype=dense.dtype)
    assert planned_sizes(bnbq.plan(empty, {"cpu": "1GB"}, config)) == planned_sizes(plan)
    bnbq.quantize_model(dense, config)
    assert planned_sizes(plan) == sizes(dense) == planned_sizes(bnbq.plan(dense, {"cpu": "1GB"}))


# ------------------------------------------------------------------ devices


def test_the_device_map_loads_as_planned(llama, tmp_path):
    whole = bnbq.plan(llama, {"cpu": "1GB"})
    room = whole.bytes * 2 // 3
    plan = bnbq.plan(llama, {"cpu": room})
    assert not plan.fits and plan.used["disk"] > 0 and plan.used["cpu"] + plan.used["disk"] == plan.bytes
    assert plan.left == {"cpu": room - plan.used["cpu"]} and plan.left["cpu"] > 0
    assert "does not fit" in str(plan) and "disk" in str(plan)
    model = load(AUTO, llama, {}, device_map=plan.device_map, offload_folder=tmp_path)
    on_disk = sum(size_of(p) for p in model.parameters() if p.is_meta)
    assert model.hf_device_map == plan.device_map
    assert on_disk == plan.used["disk"] - size_of(model.model.rotary_emb.inv_freq) * 2  # buffers are not offloaded
    dense = AUTO.from_pretrained(llama)
    bnbq.quantize_model(dense, device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path)
    assert dense.hf_device_map == plan.device_map


def test_gpus_that_are_not_here(llama):
    """Blocks stay whole, GPUs are filled first, what each is given is what it has."""
    whole = bnbq.plan(llama, {"cpu": "1GB"})
    block = sum(m.bytes for m in whole.modules if m.name.startswith("model.layers.0."))
    room = whole.bytes - block
    plan = bnbq.plan(llama, {"cpu": 10**9, 0: room, 1: room}, strategy="sequential")
    assert plan.used.keys() == {0, 1, "cpu"} and plan.fits and sum(plan.used.values()) == whole.bytes
    assert plan.used[0] > 0 and plan.used[1] > 0 and plan.used["cpu"] == 0
    assert all(0 <= left for left in plan.left.values())
    for i in range(2):
        devices = {m.device for m in plan.modules if m.name.startswith(f"model.layers.{i}.")}
        assert len(devices) == 1
    assert plan.device_map == placement.plan(
        load(AUTO, llama, {}), "sequential", {"cpu": 10**9, 0: room, 1: room}
    )


def test_tied_weights_count_once(tmp_path):
    folder = small_models.llama(tmp_path / "tied", tie_word_embeddings=True)
    plan = bnbq.plan(folder, {"cpu": "1GB"})
    assert "lm_head" not in planned_sizes(plan)
    assert planned_sizes(plan)["model.embed_tokens"] == 259 * 64 * 2


def test_text_is_one_table(llama):
    plan = bnbq.plan(llama, {0: "1GB", "cpu": "1GB"}, bnbq.BnbqConfig(double_quant=True))
    lines = str(plan).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("module"))
    assert lines[header].split() == ["module", "class", "format", "bytes", "device"]
    row = next(line for line in lines if line.startswith("model.layers.*.mlp.up_proj"))
    assert "x2" in row and "nf4/64+dq" in row and row.endswith("GPU 0")
    assert len(plan.text(every=True).splitlines()) == header + 1 + len(plan.modules)


def test_memory_of_this_machine(llama):
    plan = bnbq.plan(llama)
    assert plan.memory["cpu"] > 10**6 and sum(plan.used.values()) == plan.bytes


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "memory, kind, text",
    [
        ("24GB", TypeError, "memory is '24GB'"),
        ({}, ValueError, "memory is empty"),
        ({"cpu": -1}, ValueError, "-1"),
        ({"cpu": 1.5}, ValueError, "1.5"),
        ({"cpu": "much"}, ValueError, "much|size"),
        ({"moon": 10}, ValueError, "moon"),
    ],
)
def test_bad_memory(llama, memory, kind, text):
    with pytest.raises(kind, match=text):
        bnbq.plan(llama, memory)


def test_bad_models(llama, tmp_path):
    with pytest.raises(TypeError, match="got a int"):
        bnbq.plan(3, {"cpu": 1})
    with pytest.raises(ValueError, match="strategy is 'fast'"):
        bnbq.plan(llama, {"cpu": 1}, strategy="fast")
    with pytest.raises(UserError, match="nowhere"):
        bnbq.plan(tmp_path / "nowhere", {"cpu": 1})
    quantised = load(AUTO, llama, {})
    with pytest.raises(ValueError, match="quantised already"):
        bnbq.plan(quantised, {"cpu": 1}, bnbq.BnbqConfig())
    quantised.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="quantised to 4 bits"):
        bnbq.plan(tmp_path / "saved", {"cpu": 1}, bnbq.BnbqConfig(bits=8))
    small_models.edit_config(tmp_path / "saved", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="gptq"):
        bnbq.plan(tmp_path / "saved", {"cpu": 1})
    with pytest.raises(ValueError, match="q_prj.*close names: q_proj"):
        bnbq.plan(llama, {"cpu": 1}, bnbq.BnbqConfig(skip_modules=["q_prj"]))
