"""Traps of Transformers, PEFT and Accelerate that no test of a feature stands on: each falls silent, or looks right."""

import copy
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

import bnbq  # noqa: E402
from adapters import (  # noqa: E402, F401
    IDS,
    LAYERS,
    SETTINGS,
    assert_packed,
    base_model,
    logits,
    packed,
    quantized_layers,
)
from bnbq.integrations.transformers import BnbqQuantizer  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("name", SETTINGS)]


class Tower(transformers.PreTrainedModel):
    """A model whose first tensors are those of a linear layer, as a vision tower's may be."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(64, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.last = torch.nn.Linear(64, 64)
        self.post_init()


# ------------------------------------------------------------------ Transformers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_whole_model_leaves_the_scales(source, name, dtype):
    """Transformers refuses to cast bitsandbytes' models and casts all others: scales and codes stay what they are."""
    model = base_model(source, name)
    before = packed(model)
    model.to(dtype)
    assert model.model.norm.weight.dtype == dtype
    after = packed(model)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key


def test_counting_and_sharded_saving_do_not_import_bitsandbytes(source, tmp_path, monkeypatch, name):
    """Both do for models that say is_loaded_in_4bit, and fail where bitsandbytes is not installed."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = base_model(source, name)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_the_dtype_of_a_model_is_not_that_of_its_scales(name):
    """Transformers takes it from the first float Parameter, and casts inputs to it: a layer's bias comes first."""
    model = Tower(transformers.LlamaConfig(hidden_size=64)).to(torch.bfloat16)
    bnbq.quantize_model(model, bnbq.BnbqConfig(**SETTINGS[name]))
    assert isinstance(model.first, LAYERS)
    assert model.dtype == torch.bfloat16


class BareTower(transformers.PreTrainedModel):
    """It begins with linear layers without bias, in blocks whose order means something."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": self.block()}) for _ in range(2)])
        self.post_init()

    def block(self):
        block = torch.nn.Module()
        block.proj = torch.nn.Linear(64, 64, bias=False)
        block.act = torch.nn.GELU()
        block.norm = torch.nn.LayerNorm(64)
        return block


def test_nor_of_those_without_a_bias(name):
    """The order of modules decides; names, and that of the blocks of a list, stay."""
    model = BareTower(transformers.LlamaConfig(hidden_size=64)).to(torch.bfloat16)
    names = set(dict(model.named_parameters()))
    bnbq.quantize_model(model, bnbq.BnbqConfig(**SETTINGS[name], llm_int8_skip_modules=[]))
    assert all(isinstance(block["mlp"].proj, LAYERS) for block in model.blocks)
    assert model.dtype == torch.bfloat16
    assert [key for key, _ in model.blocks[0]["mlp"].named_children()] == ["norm", "proj", "act"]
    assert {key for key in model.state_dict() if "norm" in key} == {key for key in names if "norm" in key}


def test_nor_in_a_model_that_begins_with_attention(name, tmp_path):
    """Blt's parts begin with q_proj."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    part = dict(sizes, vocab_size=32, hidden_size_global=64)
    config = transformers.BltConfig(
        vocab_size=32,
        encoder_hash_byte_group_vocab=16,
        encoder_hash_byte_group_size=[3],
        encoder_config=part,
        decoder_config=part,
        global_config=sizes,
        patcher_config=sizes | {"vocab_size": 32},
    )
    transformers.BltForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    settings = bnbq.BnbqConfig(**SETTINGS[name])
    model = transformers.BltForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.bfloat16)
    assert isinstance(model.model.local_encoder.layers[0].self_attn.q_proj, LAYERS)
    parts = {n: m.dtype for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}
    assert len(parts) > 4 and set(parts.values()) == {torch.bfloat16}, parts


def test_layers_that_a_model_keeps_in_float32_are_not_quantised(name):
    class Careful(Tower):
        _keep_in_fp32_modules = ["first"]

    class Strict(Tower):
        _keep_in_fp32_modules_strict = ["first"]

    for kind in (Careful, Strict):
        model = kind(transformers.LlamaConfig(hidden_size=64))
        bnbq.quantize_model(model, bnbq.BnbqConfig(**SETTINGS[name], include_modules=["last"]))
        assert type(model.first) is torch.nn.Linear and isinstance(model.last, LAYERS)


def test_meta_scales_are_float32_whatever_the_default_dtype(name):
    """Layers are made while Transformers has the model's dtype as the default, and loading casts to what they have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32))
        bnbq.quantize_model(layers, bnbq.BnbqConfig(**SETTINGS[name], include_modules=["0", "1"]))
    finally:
        torch.set_default_dtype(before)
    for leaf, (_, dtype) in layers[0].packed_spec().items():
        assert getattr(layers[0], leaf).dtype == dtype and dtype in (torch.uint8, torch.int8, torch.float32)


def test_dequantize_of_a_model_without_quantised_layers(source, name):
    """bitsandbytes' integration raises UnboundLocalError."""
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = bnbq.BnbqConfig(**SETTINGS[name], skip_modules=everything)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert not quantized_layers(model)
    expected = logits(model)
    model.dequantize()
    assert torch.equal(logits(model), expected) and not model.is_quantized


def test_converters_are_copied_for_each_tensor_without_what_they_hold(source, monkeypatch, name):
    """Transformers deep-copies a converter, with all its operations hold, once for every tensor of the checkpoint."""
    copied = []
    monkeypatch.setattr(BnbqQuantizer, "__deepcopy__", lambda self, memo: copied.append(1) or self, raising=False)
    config = bnbq.BnbqConfig(**SETTINGS[name])
    transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert not copied


@pytest.mark.parametrize("key", ["tp_size", "fsdp_size", "pp_size"])
def test_splitting_a_model_while_it_is_loaded_is_refused(source, monkeypatch, name, key):
    """It splits float weights before they are quantised, and packed ones before their checksums are read."""
    from transformers.distributed import DistributedConfig

    # As in a process of two: the mesh that from_pretrained would make needs both.
    monkeypatch.setattr(
        transformers.PreTrainedModel, "prepare_distribute_model", lambda config, device_map: (config, device_map, None)
    )
    config = bnbq.BnbqConfig(**SETTINGS[name])
    distributed = DistributedConfig(**{"tp_size": 1, key: 2})
    with pytest.raises(ValueError, match=f"cannot be split while it is loaded .{key} is 2.*fully_shard"):
        transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, distributed_config=distributed
        )


# ------------------------------------------------------------------ Accelerate


def test_a_dtype_for_accelerates_loader_is_an_error_when_computing(source, tmp_path, name):
    """load_checkpoint_in_model(dtype=) casts every float tensor, scales too: that is said, and not computed with."""
    model = base_model(source, name)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        fresh = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(source))
    bnbq.quantize_model(fresh, bnbq.BnbqConfig(**SETTINGS[name]))
    accelerate.load_checkpoint_in_model(fresh, tmp_path, device_map={"": "cpu"}, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="absmax.* is bfloat16, wanted float32"):
        logits(fresh)


def test_names_of_the_state_dict_are_those_that_distributed_checkpoints_look_up(source, name):
    """torch.distributed.checkpoint resolves each dotted name by getattr; bitsandbytes' are no attributes of anything."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = base_model(source, name), base_model(source, name)
    before = packed(model)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    for layer in quantized_layers(other).values():
        layer.weight.data.zero_()
    set_model_state_dict(other, copy.deepcopy(state))
    assert_packed(other, before)


# ------------------------------------------------------------------ PEFT


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_adapters_have_the_compute_dtype_or_stay_float32(source, name, compute_dtype):
    """PEFT gives an adapter the dtype of the weight, or of qweight, where the layer has no compute_dtype to say."""
    model = base_model(source, name).to(torch.bfloat16)
    bnbq.set_compute_dtype(model, compute_dtype)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {compute_dtype or torch.float32}
    assert logits(adapted).dtype == torch.bfloat16


def test_mixed_tuners_take_the_model_for_no_bitsandbytes_one(source, name):
    """PeftMixedModel refuses what says is_loaded_in_4bit or is_loaded_in_8bit."""
    model = base_model(source, name)
    before = list(packed(model).values())
    settings = dict(target_modules=["q_proj"], init_weights=False)
    mixed = peft.get_peft_model(model, peft.LoHaConfig(r=2, **settings), mixed=True)
    mixed.add_adapter("other", peft.LoKrConfig(r=2, **settings))
    mixed.set_adapter(["default", "other"])
    mixed(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in mixed.named_parameters() if p.requires_grad)
    assert all(map(torch.equal, packed(mixed).values(), before))
