"""Unmodified Accelerate: hooks, offload to CPU and disk, its own loaders, and load_and_quantize."""

import warnings

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", minversion="5.0")

from accelerate.hooks import AlignDevicesHook  # noqa: E402
from accelerate.utils import set_module_tensor_to_device  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn  # noqa: E402
from bnbq.integrations.accelerate import load_and_quantize  # noqa: E402
from hf import AUTO, IDS, SPLIT, logits  # noqa: E402

SETTINGS = {"4bit": dict(bits=4), "4bit-dq": dict(bits=4, double_quant=True), "8bit": dict(bits=8)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32, shard="90KB")


@pytest.fixture(params=SETTINGS)
def config(request):
    return bnbq.BnbqConfig(**SETTINGS[request.param])


def quantized(source, config):
    return AUTO.from_pretrained(source, quantization_config=config)


def empty(source):
    with accelerate.init_empty_weights():
        return transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(source))


def packed_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear4bit, nn.Linear8bitLt))}


# ------------------------------------------------------------------ Accelerate's own functions


def test_class_names_are_those_that_accelerate_tests(source, config):
    for layer in packed_layers(quantized(source, config)).values():
        assert type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
        if isinstance(layer, nn.Linear4bit):
            assert layer.weight.quant_state is not None
        else:
            assert layer.weight.SCB.data_ptr() == layer.state.SCB.data_ptr() == layer.absmax.data_ptr()
            layer.state.SCB = layer.state.CxB = None  # as a hook does when it offloads
            layer.state = layer.state  # as PEFT does when it wraps
            assert layer.state.SCB.data_ptr() == layer.absmax.data_ptr()


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offload_whole_models(source, tmp_path, config, how):
    """cpu_offload and disk_offload: every tensor comes for a forward and goes again."""
    model = quantized(source, config)
    expected, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert all(p.device.type == "meta" for p in model.parameters())
        assert torch.equal(logits(model), expected)
    for name, layer in packed_layers(model).items():
        assert layer.qweight.device.type == "meta" and layer.weight.shape == (layer.out_features, layer.in_features)
        with accelerate.utils.align_module_device(layer):
            for leaf in layer.packed_spec():
                assert (
                    torch.equal(getattr(layer, leaf), state[f"{name}.{leaf}"])
                    and getattr(layer, leaf).dtype == state[f"{name}.{leaf}"].dtype
                )
            assert not layer.qweight.requires_grad


def test_dispatch_with_a_split_map(source, tmp_path, config):
    model = quantized(source, config)
    expected = logits(model)
    model = accelerate.dispatch_model(model, SPLIT, offload_dir=tmp_path)
    assert model.model.layers[0].mlp.up_proj.qweight.device.type == "meta"
    assert model.model.layers[1].mlp.up_proj.qweight.device.type == "cpu"
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False)[:, :10], IDS)


def test_training_an_adapter_over_offloaded_layers(source, tmp_path, config):
    """The gradient of an input flows through layers that are on disk between forward and backward."""
    model = quantized(source, config)

    def gradient(model):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    expected = gradient(model)
    accelerate.dispatch_model(model, SPLIT, offload_dir=tmp_path)
    assert torch.equal(gradient(model), expected)


def test_moving_one_tensor_by_name(source, config):
    """set_module_tensor_to_device, on which all of Accelerate stands: there and back through meta, bytes intact."""
    model = quantized(source, config)
    layer = model.model.layers[0].mlp.down_proj
    for leaf in layer.packed_spec():
        before = getattr(layer, leaf).detach().clone()
        set_module_tensor_to_device(layer, leaf, "meta")
        assert getattr(layer, leaf).device.type == "meta"
        set_module_tensor_to_device(layer, leaf, "cpu", value=before)
        assert torch.equal(getattr(layer, leaf), before) and not getattr(layer, leaf).requires_grad


def test_hook_on_one_layer(source, config):
    layer = quantized(source, config).model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    expected = layer(x)
    accelerate.hooks.add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True))
    assert layer.qweight.device.type == "meta" and torch.equal(layer(x), expected)
    accelerate.hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, SPLIT, None], ids=["cpu", "split", "none"])
def test_accelerates_loader_reads_packed_checkpoints(source, tmp_path, config, device_map):
    """load_checkpoint_in_model into layers on meta: the names in the file are the parameters' names."""
    model = quantized(source, config)
    model.save_pretrained(tmp_path / "packed")
    fresh = empty(source)
    bnbq.quantize_model(fresh, config)
    assert all(layer.qweight.is_meta for layer in packed_layers(fresh).values())
    if device_map is None:
        fresh.to_empty(device="cpu")
    accelerate.load_checkpoint_in_model(
        fresh, tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    if device_map is SPLIT:
        accelerate.dispatch_model(fresh, device_map, offload_dir=tmp_path / "disk")
    if device_map is None:  # to_empty cleared the buffers that no file holds
        fresh.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(logits(fresh), logits(model))


def test_planning_counts_packed_bytes(source, config):
    model = quantized(source, config)
    sizes = accelerate.utils.compute_module_sizes(model)
    layer = model.model.layers[0].mlp.up_proj
    assert sizes["model.layers.0.mlp.up_proj"] == sum(getattr(layer, leaf).nbytes for leaf in layer.packed_spec())
    assert sizes[""] == model.get_memory_footprint()
    head = sizes["lm_head"] + sizes["model.embed_tokens"]
    plan = accelerate.infer_auto_device_map(
        model, {0: head + sizes["model.layers.0"] + 1000, "cpu": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert plan["model.layers.1"] == "cpu" and plan["model.embed_tokens"] == 0


@pytest.fixture
def fresh_accelerator_state():
    """Accelerate keeps one state per process, and another test's Trainer may have set it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_prepare_leaves_the_bytes_alone(source, config, fresh_accelerator_state):
    model = quantized(source, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert logits(prepared).isfinite().all()
    assert all(
        torch.equal(before[name], p) and before[name].dtype == p.dtype for name, p in prepared.named_parameters()
    )


# ------------------------------------------------------------------ load_and_quantize


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"": "disk"}, SPLIT], ids=str)
def test_load_and_quantize(source, tmp_path, config, device_map):
    wanted = quantized(source, config)
    model = load_and_quantize(empty(source), config, source, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(wanted))
    assert packed_layers(model).keys() == packed_layers(wanted).keys()
    if isinstance(device_map, dict) and "disk" in device_map.values():
        assert model.model.layers[0].mlp.up_proj.qweight.device.type == "meta"
        assert {path.suffix for path in tmp_path.glob("bnbq-*/*")} == {".dat", ".json"}
    else:
        assert all(not p.is_meta for p in model.parameters())
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "saved")), logits(wanted))


def test_load_and_quantize_reads_what_there_is(source, tmp_path, config):
    wanted = quantized(source, config)
    wanted.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load_and_quantize(empty(source), config, tmp_path / "packed")), logits(wanted))
    assert torch.equal(
        logits(load_and_quantize(empty(source), config, source / "model.safetensors.index.json")), logits(wanted)
    )
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_and_quantize(empty(source), config, tmp_path / "pytorch_model.bin")), logits(wanted))
    in_memory = AUTO.from_pretrained(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_and_quantize(in_memory, config) is in_memory
    assert torch.equal(logits(in_memory), logits(wanted))


def test_load_and_quantize_takes_the_names_of_published_files(tmp_path):
    """GPT-2's lack the prefix that its language model has, and BERT's have old names of its norms' weights."""
    for make, auto in ((small_models.gpt2, AUTO), (small_models.bert, transformers.AutoModelForMaskedLM)):
        folder = make(tmp_path / make.__name__)
        wanted = auto.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
        tensors = {
            name.removeprefix("transformer.").replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with accelerate.init_empty_weights():
            fresh = auto.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
        model = load_and_quantize(fresh, bnbq.BnbqConfig(), folder)
        assert torch.equal(logits(model), logits(wanted)), make.__name__


def test_load_and_quantize_any_module(tmp_path):
    """Not a Transformers model; a BitsAndBytesConfig; tied weights are the module's own business."""
    dense = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    model = load_and_quantize(fresh, transformers.BitsAndBytesConfig(load_in_8bit=True), tmp_path / "model.safetensors")
    assert isinstance(model[0], nn.Linear8bitLt)
    assert torch.equal(model[0].qweight, nn.Linear8bitLt.from_linear(dense[0]).qweight) and torch.equal(
        model[0].bias, dense[0].bias
    )


def test_load_and_quantize_refuses(source, tmp_path):
    config = bnbq.BnbqConfig()
    with pytest.raises(ValueError, match="no weights_location"):
        load_and_quantize(empty(source), config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_and_quantize(empty(source), config, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="offload_folder"):
        load_and_quantize(empty(source), config, source, device_map={"": "disk"})
    with pytest.raises(ValueError, match="nothing says where"):
        load_and_quantize(empty(source), config, source, device_map={"lm_head": "cpu"})
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for change, word in (
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj"),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")),
            "model.layers.1.mlp.up_proj.weight.*nan",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 3)}), "lm_head.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 128)}),
            "model.layers.1.mlp.up_proj.weight",
        ),
    ):
        spoilt = {name: tensor.clone() for name, tensor in tensors.items()}
        change(spoilt)
        save_file(spoilt, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=word):
            load_and_quantize(empty(source), config, tmp_path)
    save_file({**tensors, "extra.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="extra.weight"):
        load_and_quantize(empty(source), config, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="not the name of a file"):
        load_and_quantize(empty(source), config, tmp_path / "model.safetensors.index.json")


# ------------------------------------------------------------------ entries of a device_map inside others


NESTED = [
    {"": "cpu", "model.layers.1": "disk"},
    {"": "disk", "model.layers.1": "cpu", "model.layers.1.mlp": "disk"},
    {"model": "disk", "model.layers.1": "cpu", "lm_head": "cpu"},
    {"": "cpu", "model.layers.1.self_attn.q_proj": "disk", "lm_head": "cpu"},
]


def on_disk(name, device_map):
    while name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name] == "disk"


@pytest.mark.parametrize("how", ["from_pretrained", "packed", "quantize_model", "load_and_quantize"])
@pytest.mark.parametrize("device_map", NESTED, ids=str)
def test_entries_inside_others(tmp_path, device_map, how):
    """Accelerate's own error is about a weight on the meta device; eleven layers, so that one name begins another."""
    source = small_models.llama(tmp_path / "llama", dtype=torch.float32, num_hidden_layers=11)
    config, given = bnbq.BnbqConfig(), dict(device_map)
    wanted, place = quantized(source, config), {"device_map": device_map, "offload_folder": tmp_path / "disk"}
    if how == "from_pretrained":
        model = AUTO.from_pretrained(source, quantization_config=config, **place)
    elif how == "packed":
        wanted.save_pretrained(tmp_path / "packed")
        model = AUTO.from_pretrained(tmp_path / "packed", **place)
    elif how == "quantize_model":
        model = AUTO.from_pretrained(source)
        bnbq.quantize_model(model, config, **place)
    else:
        model = load_and_quantize(empty(source), config, source, **place)
    assert device_map == given
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == on_disk(name, device_map), name
    assert torch.equal(logits(model), logits(wanted))


def test_maps_without_entries_inside_others_stay(source):
    model = AUTO.from_pretrained(source)
    for device_map in ({"": "cpu"}, SPLIT, {"": 0, "lm_head": 0}, {"model": 0, "model.layers": 0, "lm_head": "cpu"}):
        assert bnbq.placement.flatten(model, device_map) == device_map
    flat = bnbq.placement.flatten(model, {"": 0, "model.layers.1": "cpu"})
    assert flat == {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}


def test_a_parameter_on_disk_without_its_module(tmp_path):
    """gpt-oss' experts have biases of their own beside the packed weights, which are modules."""
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, num_local_experts=4, vocab_size=64,
    )
    torch.manual_seed(0)
    AUTO.from_config(config).save_pretrained(tmp_path / "float")
    experts, settings = "model.layers.0.mlp.experts", {"quantization_config": bnbq.BnbqConfig()}
    settings["offload_folder"] = tmp_path / "disk"
    wanted = logits(quantized(tmp_path / "float", bnbq.BnbqConfig()))
    model = AUTO.from_pretrained(tmp_path / "float", device_map={"": "cpu", f"{experts}.down_proj": "disk"}, **settings)
    assert model.get_submodule(experts).down_proj.qweight.is_meta and torch.equal(logits(model), wanted)
    with pytest.raises(ValueError, match=f"{experts}.gate_up_proj_bias would be on disk.*give {experts} one device"):
        AUTO.from_pretrained(tmp_path / "float", device_map={"": "disk", f"{experts}.down_proj": "cpu"}, **settings)
