"""quantize_model: what it replaces and keeps, names, errors, hooks, memory, and where the model goes."""

import copy
import gc
import logging
import warnings
import weakref

import pytest
import torch
from torch import nn as torch_nn

from bnbq import nn
from bnbq.config import BnbqConfig
from bnbq.replace import make_layer, quantize_model
from bnbq.selection import Facts, matches, select, select_modules


@pytest.fixture(autouse=True)
def quiet():
    """Toy models are mostly not linear layers; the one test of the warning asks for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="quantize_model: only")
        yield


class Block(torch_nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = torch_nn.LayerNorm(width)
        self.up, self.down = torch_nn.Linear(width, 2 * width), torch_nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(torch_nn.Module):
    """Embedding, two blocks, a head."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = torch_nn.Embedding(50, width)
        self.layers = torch_nn.ModuleList([Block(width) for _ in range(2)])
        self.lm_head = torch_nn.Linear(width, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


LINEARS = {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"}
IDS = torch.arange(12).view(2, 6)


def quantized(model) -> set:
    return {name for name, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}


# ------------------------------------------------------------------ what is replaced


@pytest.mark.parametrize(
    "config, kind",
    [
        (None, nn.Linear4bit),
        (BnbqConfig(quant_type="int4", blocksize=32, double_quant=True), nn.Linear4bit),
        (BnbqConfig(load_in_8bit=True), nn.Linear8bitLt),
    ],
)
def test_quantizes_in_place(net, config, kind, caplog):
    expected = {
        name: kind.from_linear(net.get_submodule(name), **(config or BnbqConfig()).layer_settings()) for name in LINEARS
    }
    embed, y = net.embed, net(IDS)
    with caplog.at_level(logging.INFO, "bnbq"):
        result = quantize_model(net, config)
    assert quantized(net) == LINEARS and net.embed is embed and type(net.lm_head) is torch_nn.Linear
    for name, layer in expected.items():
        state = net.get_submodule(name).state_dict()
        assert type(net.get_submodule(name)) is kind
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert (net(IDS) - y).norm() < 0.2 * y.norm()
    line = caplog.records[-1].getMessage()
    assert (
        line == result.summary()
        and line.startswith("4 of 5 linear layers quantised")
        and line.endswith("kept: lm_head")
    )
    assert len(caplog.records) == 1 and {row.name for row in result.quantized} == LINEARS


def test_from_bitsandbytes_config_and_json(net):
    transformers = pytest.importorskip("transformers")
    other = copy.deepcopy(net)
    quantize_model(net, transformers.BitsAndBytesConfig(load_in_4bit=True))
    quantize_model(other, BnbqConfig(quant_type="fp4", compute_dtype="float32").to_dict())
    assert net.layers[0].up.quant_type == "fp4" and net.layers[0].up.compute_dtype == torch.float32
    assert repr(net) == repr(other)


def test_twice_is_once(net):
    quantize_model(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantize_model(net, BnbqConfig(bits=8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert select(net).kept["layers.0.up"] == "already quantised"


def test_a_shared_module_stays_shared(net):
    net.layers[1].up = net.layers[0].up
    quantize_model(net)
    assert net.layers[1].up is net.layers[0].up and isinstance(net.layers[1].up, nn.Linear4bit)


def test_hooks_and_mode_survive(net):
    calls = []
    net.layers[0].up.register_forward_hook(lambda *a: calls.append("forward"))
    net.layers[0].up.register_forward_pre_hook(lambda *a: calls.append("pre"))
    net.layers[0].eval()
    quantize_model(net)
    net(IDS)
    assert calls == ["pre", "forward"] and not net.layers[0].up.training and net.layers[1].up.training


def test_float_weights_are_let_go_one_by_one(net):
    alive = {name: weakref.ref(net.get_submodule(name).weight) for name in LINEARS}
    seen = []

    def progress(done, total, name):
        gc.collect()
        seen.append((done, total, name, sum(ref() is not None for ref in alive.values())))

    quantize_model(net, progress=progress)
    assert [s[0] for s in seen] == [1, 2, 3, 4] and {s[1] for s in seen} == {4} and {s[2] for s in seen} == LINEARS
    assert [s[3] for s in seen] == [3, 2, 1, 0]


def test_progress_bar_and_nonsense(net, capsys):
    pytest.importorskip("tqdm")
    quantize_model(copy.deepcopy(net), progress=True)
    assert "quantising" in capsys.readouterr().err
    quantize_model(copy.deepcopy(net))
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match="progress: got 'yes'"):
        quantize_model(net, progress="yes")


def test_on_meta_layers_are_made_unfilled(net):
    result = quantize_model(net.to("meta"))
    assert net.layers[0].up.qweight.is_meta and result.bytes < result.bytes_as_float


# ------------------------------------------------------------------ what is kept, and why


def test_reasons():
    class Moe(torch_nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.gate_proj, self.router = (torch_nn.Linear(64, 64) for _ in range(3))
            self.experts = torch_nn.ModuleList([torch_nn.Linear(64, 64)])
            self.shared_expert_gate = torch_nn.Linear(64, 1)

    class Special(torch_nn.Linear):
        pass

    model = torch_nn.ModuleDict(
        {
            "moe": Moe(),
            "mlp": torch_nn.ModuleDict({"gate": torch_nn.Linear(64, 64)}),
            "lm_head": torch_nn.Linear(64, 64),
            "score": torch_nn.Linear(64, 64),
            "classifier": torch_nn.Sequential(torch_nn.Linear(64, 64)),
            "special": Special(64, 64),
            "attention": torch_nn.MultiheadAttention(64, 4),
            "value": torch_nn.Linear(64, 1),
            "wide": torch_nn.Linear(64, 64),
            "a": torch_nn.Linear(64, 64),
            "b": torch_nn.Linear(64, 64),
        }
    )
    model["b"].weight = model["a"].weight
    model["normed"] = torch_nn.utils.spectral_norm(torch_nn.Linear(64, 64))
    chosen, kept = select(model)
    assert set(chosen) == {"moe.gate_proj", "moe.experts.0", "mlp.gate", "wide"}
    assert {name: reason.split(":")[0] for name, reason in kept.items()} == {
        "moe.gate": "MoE router",
        "moe.router": "MoE router",
        "moe.shared_expert_gate": "MoE router",
        "lm_head": "output head",
        "score": "classifier head",
        "classifier.0": "classifier head",
        "special": "subclass of nn.Linear",
        "attention.out_proj": "subclass of nn.Linear",
        "value": "single output",
        "normed": "its weight is computed, by weight_norm, spectral_norm or pruning",
        "a": "tied weight",
        "b": "tied weight",
    }


def test_names_are_runs_of_components():
    assert matches("layers.1", "model.layers.1.mlp") and not matches("layers.1", "model.layers.11.mlp")
    assert (
        matches("mlp.gate", "layers.0.mlp.gate")
        and not matches("mlp.gate", "layers.0.mlp.gate_proj")
        and not matches("gate", "gate_proj")
    )


def test_skip_modules_add_to_the_defaults(net):
    assert set(select_modules(net, BnbqConfig(skip_modules=["down"]))) == {"layers.0.up", "layers.1.up"}
    assert set(select_modules(net, BnbqConfig(skip_modules=["layers.1", "up"]))) == {"layers.0.down"}
    kept = select(net, BnbqConfig(skip_modules=["down"])).kept
    assert kept == {
        "layers.0.down": "skip_modules: down",
        "layers.1.down": "skip_modules: down",
        "lm_head": "output head",
    }
    assert (
        set(select_modules(net, BnbqConfig(skip_modules=["lm_head", "score"]))) == LINEARS
    )  # names of the defaults may miss
    assert set(select_modules(net, BnbqConfig(skip_modules=["nothing"]), strict=False)) == LINEARS


def test_include_overrides_the_defaults(net):
    assert (
        set(select_modules(net, include=["lm_head"]))
        == set(select_modules(net, BnbqConfig(include_modules=["lm_head"])))
        == LINEARS | {"lm_head"}
    )
    quantize_model(net, include=["lm_head"])
    assert isinstance(net.lm_head, nn.Linear4bit)


def test_including_a_tied_head_unties_it(net):
    net.lm_head.weight = net.embed.weight
    assert select(net).kept["lm_head"] == "output head"
    net.head2, net.lm_head = net.lm_head, torch_nn.Identity()
    assert select(net).kept["head2"] == "tied weight"
    before = net.embed.weight.detach().clone()
    quantize_model(net, include=["head2"])
    assert isinstance(net.head2, nn.Linear4bit) and torch.equal(net.embed.weight, before)


@pytest.mark.parametrize(
    "config, include, text",
    [
        (BnbqConfig(skip_modules=["dwn"]), (), "skip_modules: 'dwn' matches no module of Net; close names: down"),
        (BnbqConfig(skip_modules=["layers.*.up"]), (), "without wildcards"),
        (None, ["lm_haed"], "include: 'lm_haed' matches no module of Net"),
        (
            BnbqConfig(skip_modules=["lm_head"]),
            ["lm_head"],
            "lm_head is both in skip_modules ('lm_head') and in include ('lm_head')",
        ),
    ],
)
def test_names_that_cannot_be_meant(net, config, include, text):
    with pytest.raises(ValueError) as error:
        quantize_model(net, config, include=include)
    assert text in str(error.value) and not quantized(net)


def test_what_cannot_be_replaced_cannot_be_included():
    model = torch_nn.ModuleDict({"attention": torch_nn.MultiheadAttention(64, 4), "a": torch_nn.Linear(64, 64)})
    with pytest.raises(ValueError, match=r"include: attention.out_proj cannot be quantised: subclass"):
        select(model, include=["attention.out_proj"])


def test_warns_once_about_what_was_left(net):
    net.experts = torch_nn.Parameter(torch.randn(8, 64, 64))
    net.sized = torch_nn.ModuleDict({"experts": torch_nn.Module()})
    net.sized["experts"].gate_up = torch_nn.Parameter(torch.randn(8, 64, 64))
    with pytest.warns(UserWarning) as caught:
        warnings.simplefilter("always")
        quantize_model(net)
    messages = [str(w.message) for w in caught if "quantize_model" in str(w.message)]
    assert (
        len(messages) == 1 and "sized.experts (131.1 kB, 3-D expert weights" in messages[0] and "lm_head" in messages[0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(
            torch_nn.Sequential(torch_nn.Embedding(1000, 64), torch_nn.Linear(64, 64), torch_nn.Linear(64, 64))
        )


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_layer_and_index(net, bad):
    with torch.no_grad():
        net.layers[1].up.weight[3, 5] = bad
    first = net.layers[1].up
    with pytest.raises(ValueError) as error:
        quantize_model(net)
    message = str(error.value)
    assert "layers.1.up: " in message and str(bad) in message and "(3, 5)" in message
    assert "2 of 4 layers are quantised and stay so" in message
    assert quantized(net) == {"layers.0.up", "layers.0.down"} and net.layers[1].up is first
    assert net(IDS).shape == (2, 6, 50)
    with torch.no_grad():
        first.weight[3, 5] = 0
    quantize_model(net)  # goes on where it stopped
    assert quantized(net) == LINEARS


def test_a_linear_layer_cannot_replace_itself():
    with pytest.raises(TypeError, match=r"use Linear4bit.from_linear"):
        quantize_model(torch_nn.Linear(4, 4))


def test_a_model_half_on_meta_is_refused(net):
    net.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"layers.1.up.weight is on the meta device"):
        quantize_model(net)
    assert not quantized(net)


# ------------------------------------------------------------------ make_layer


def test_make_layer():
    linear = torch_nn.Linear(100, 8).bfloat16().eval()
    layer = make_layer(linear, BnbqConfig(double_quant=True))
    assert not layer.qweight.is_meta and layer.double_quant and layer.weight_dtype == torch.bfloat16
    empty = make_layer(linear, BnbqConfig(bits=8, threshold=0), device="meta")
    assert (
        empty.qweight.is_meta
        and empty.bias.is_meta
        and empty.weight_dtype == torch.bfloat16
        and empty.threshold == 0
        and not empty.training
    )
    assert make_layer(linear, None, device="cpu").qweight.device.type == "cpu"


# ------------------------------------------------------------------ where the model goes

DISK = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "lm_head": "cpu"}


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        "balanced",
        "sequential",
        "balanced_low_0",
        torch.device("cpu"),
        {"": "cpu"},
        "disk",
        {"": "disk"},
        DISK,
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [BnbqConfig(double_quant=True), BnbqConfig(bits=8)], ids=["4", "8"])
def test_every_placement_computes_the_same(net, device_map, config, tmp_path):
    pytest.importorskip("accelerate")
    here = copy.deepcopy(net)
    quantize_model(here, config)
    expected = here(IDS)
    result = quantize_model(net, config, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(net(IDS), expected) and torch.equal(net(IDS), expected)
    on_disk = net.layers[1].up.qweight.is_meta
    assert on_disk == (device_map in ("disk", {"": "disk"}, DISK)) and net.hf_device_map
    assert all(row.kernel == result.quantized[0].kernel and "meta" not in row.kernel for row in result.quantized)
    if on_disk:  # and gradients flow through a layer on disk
        block, x, y = net.layers[1], torch.randn(2, 64), torch.randn(2, 64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        block(a).backward(y)
        here.layers[1](b).backward(y)
        assert torch.equal(a.grad, b.grad)


def test_the_plan_sees_packed_sizes(net, tmp_path):
    pytest.importorskip("accelerate")
    whole = sum(p.numel() * p.element_size() for p in copy.deepcopy(net).parameters())
    packed = copy.deepcopy(net)
    size = quantize_model(packed).bytes
    assert size < whole / 2
    # Accelerate keeps room for the largest layer that it may have to bring in.
    quantize_model(net, device_map="auto", max_memory={"cpu": size + 20_000}, offload_folder=tmp_path)
    assert set(net.hf_device_map.values()) == {"cpu"}


def test_too_little_memory_goes_to_disk(net, tmp_path):
    pytest.importorskip("accelerate")
    expected = copy.deepcopy(net)
    quantize_model(expected)
    quantize_model(net, device_map="auto", max_memory={"cpu": 40_000}, offload_folder=tmp_path)
    assert "disk" in net.hf_device_map.values() and torch.equal(net(IDS), expected(IDS))


def test_two_models_share_an_offload_folder(net, tmp_path):
    """Accelerate alone would let the second compute with the files of the first."""
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    other = Net()
    expected = []
    for model in (net, other):
        twin = copy.deepcopy(model)
        quantize_model(twin)
        expected.append(twin(IDS))
        quantize_model(model, device_map="disk", offload_folder=tmp_path)
    assert torch.equal(net(IDS), expected[0]) and torch.equal(other(IDS), expected[1]) and not torch.equal(*expected)
    assert len(list(tmp_path.iterdir())) == 2
    del net, other, model
    gc.collect()


def test_the_offloaded_files_go_with_the_model(tmp_path):
    pytest.importorskip("accelerate")
    model = Net()
    quantize_model(model, device_map="disk", offload_folder=tmp_path)
    assert list(tmp_path.iterdir())
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_offloaded_layers_load_back(net, tmp_path):
    """Removing Accelerate's hooks brings the tensors back, bit for bit."""
    hooks = pytest.importorskip("accelerate.hooks")
    expected = copy.deepcopy(net)
    quantize_model(expected)
    quantize_model(net, device_map="disk", offload_folder=tmp_path)
    hooks.remove_hook_from_submodules(net)
    for name, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


@pytest.mark.parametrize(
    "device_map, kind, text",
    [
        ("gpu", ValueError, "'gpu' is neither a device, nor 'disk'"),
        ({"layers.7": "cpu"}, ValueError, "'layers.7' is no module of Net"),
        ({"layers": "cpu"}, ValueError, "nothing says where embed.weight goes"),
        ({}, ValueError, "empty dict"),
        (1.5, TypeError, "got 1.5"),
        ({"": True}, TypeError, "got True"),
        ("disk", ValueError, "offload_folder"),
        ("cuda:99", RuntimeError, "got 'cuda:99'"),
        (99, RuntimeError, "got 'cuda:99'"),
        ({"": "xpu"}, RuntimeError, "kernels for CPUs and CUDA only"),
        ("meta", RuntimeError, "got 'meta'"),
    ],
)
def test_bad_device_maps(net, device_map, kind, text):
    pytest.importorskip("accelerate")
    with pytest.raises(kind) as error:
        quantize_model(net, device_map=device_map)
    assert text in str(error.value) and not quantized(net)


def test_a_dispatched_float_model_is_refused(net):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(net, execution_device="cpu")
    with pytest.raises(ValueError, match=r"layers.0.up has a hook of Accelerate"):
        quantize_model(net)


# ------------------------------------------------------------------ transformers' models


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def tiny(transformers, name: str):
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 200,
    }
    moe = {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    build = {
        "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**small)),
        "llama tied": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**small, tie_word_embeddings=True)),
        "gpt2": lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=200, bos_token_id=0, eos_token_id=0)
        ),
        "t5": lambda t: t.T5ForConditionalGeneration(
            t.T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=4, d_kv=16, vocab_size=200)
        ),
        "qwen2-moe": lambda t: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**small, **moe)),
        "bert": lambda t: t.BertForSequenceClassification(t.BertConfig(**small)),
    }
    return build[name](transformers).eval()


@pytest.mark.parametrize(
    "name, more",
    [
        ("llama", set()),
        ("llama tied", set()),
        ("gpt2", set()),
        ("t5", set()),
        ("qwen2-moe", {"model.layers.0.mlp.shared_expert_gate"}),
        ("bert", {"classifier"}),
    ],
)
def test_same_layers_as_bitsandbytes_but_for_gates_and_heads(transformers, name, more):
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = tiny(transformers, name)
    skipped = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or [])
    theirs = {
        n
        for n, m in model.named_modules()
        if (type(m) is torch_nn.Linear or nn.is_conv1d(m)) and should_convert_module(n, skipped)
    }
    ours = {n for n, module in select_modules(model).items() if isinstance(module, torch_nn.Module)}  # not experts
    assert theirs - ours == more and ours <= theirs


def test_a_transformers_model_knows_it_is_quantised(transformers):
    model = tiny(transformers, "gpt2")
    quantize_model(model, BnbqConfig(bits=8))
    assert model.is_quantized and model.config.quantization_config.bits == 8
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_adapters_are_left_alone(transformers):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(transformers, "llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    chosen, kept = select(model)
    assert any(name.endswith("q_proj.base_layer") for name in chosen) and not any("lora_" in name for name in chosen)
    assert {kept[name] for name in kept if "lora_" in name} == {"adapter"}


def test_tied_names_count_before_the_weights_are_tied(transformers):
    with torch.device("meta"):
        model = tiny(transformers, "llama tied")
    assert "lm_head" in Facts(model).tied_names and "lm_head" in select(model).kept
