"""Unmodified PEFT on models with packed experts: gradients through them, and adapters on them."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

import bnbq  # noqa: E402
from bnbq.experts import find  # noqa: E402
from hf import AUTO, IDS, logits, quantized  # noqa: E402
from moe_models import LAYOUTS, SETTINGS, build, packed_experts  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """(folder of a float checkpoint, the model loaded from it)."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


def test_gradients_pass_through_the_experts(layout):
    """Adapters on attention train: their gradients are those of the model with the dequantised weights."""
    folder, _ = layout
    gradients = []
    for dense in (False, True):
        model = quantized(folder, {"bits": 4})
        packed = {} if dense else {name: p.state_dict() for name, p in packed_experts(model).items()}
        model = model.dequantize() if dense else bnbq.prepare_model_for_kbit_training(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|q_b_proj|v_proj|kv_b_proj|k_proj)", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        model.train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert found and all(gradient is not None for gradient in found.values())
        gradients.append(found)
        for name, state in packed.items():
            now = model.base_model.model.get_submodule(name).state_dict()
            assert all(torch.equal(now[leaf], tensor) for leaf, tensor in state.items())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name


def adapted(model, seed=0, **settings):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, bnbq.lora_config(model, config))


def test_adapters_on_experts_train_save_and_load(layout, tmp_path):
    folder, _ = layout
    first = "up_proj" if "nemotron" in str(folder) else "gate_up_proj"
    model = bnbq.prepare_model_for_kbit_training(quantized(folder, {"bits": 4}))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = logits(model)
    model = adapted(model, target_modules=["o_proj"], target_parameters=[f"experts.{first}", "experts.down_proj"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    experts = {name for name in trainable if "experts" in name}
    assert len(experts) == 2 * len(find(AUTO.from_pretrained(folder))) and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert all(trainable[name].grad is not None for name in experts)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    now = model.base_model.model.state_dict()
    for name, tensor in before.items():  # the base is as it was, under the names that its wrappers give it
        now_named = [n for n in now if n.replace("base_layer.", "") == name]
        assert len(now_named) == 1 and torch.equal(now[now_named[0]], tensor), name
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    base = quantized(folder, {"bits": 4})
    with pytest.raises(ValueError, match="not supported"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    base = quantized(folder, {"bits": 4})
    config = bnbq.lora_config(base, peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    assert torch.equal(logits(again), trained)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adapters_on_experts_are_low_rank_updates_of_the_weights(layout, settings):
    """With and without merging: the same as the float weights plus what PEFT's own formula for experts gives."""
    folder, _ = layout
    model = adapted(quantized(folder, settings), target_modules=["experts"])
    got = logits(model)
    reference = quantized(folder, settings)
    values = {}
    for name, packed in packed_experts(reference).items():
        owner, _, leaf = name.rpartition(".")
        wrapper = model.base_model.model.get_submodule(owner)
        a, b = wrapper.pairs()[leaf]
        a = a["default"].weight.reshape(packed.num_experts, 4, packed.in_features)
        b = b["default"].weight.reshape(packed.out_features, 4, packed.num_experts)
        delta = torch.einsum("ore,eri->eoi", b, a) * 2
        values[name] = packed.dequantize() + (delta.mT if packed.transposed else delta)
    kept = {name: packed.state_dict() for name, packed in packed_experts(reference).items()}
    for name, value in values.items():
        bnbq.replace.put(reference, name, torch.nn.Parameter(value.detach().contiguous()))
    assert torch.allclose(got, logits(reference), rtol=1e-2 if settings["bits"] == 8 else 1e-4, atol=1e-2 if settings["bits"] == 8 else 1e-5)
    merged = model.merge_and_unload()
    for name, value in values.items():
        again = type(merged.get_submodule(name)).from_weight(value, merged.get_submodule(name).transposed, **merged.get_submodule(name).settings())
        difference = (again.dequantize() - merged.get_submodule(name).dequantize()).abs().max()
        assert difference < 0.02 * value.abs().max()
        assert not torch.equal(merged.get_submodule(name).qweight, kept[name]["qweight"])


def test_what_adapters_on_experts_cannot_be_is_an_error(layout):
    folder, dense = layout
    model = quantized(folder, {"bits": 4})
    with pytest.raises(ValueError, match="no quantised experts"):
        bnbq.lora_config(dense, peft.LoraConfig())
    with pytest.raises(ValueError, match="use_dora"):
        bnbq.lora_config(model, peft.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="pattern"):
        bnbq.lora_config(model, peft.LoraConfig(target_modules=".*q_proj", target_parameters=["experts.down_proj"]))
    # Without lora_config PEFT finds no such parameter; it must not go unnoticed.
    config = peft.LoraConfig(target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        lost = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="lora_config"):
        lost(IDS)


OFFLOAD = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder / "disk", execution_device=torch.device("cpu")),
    "dispatched": lambda model, folder: accelerate.dispatch_model(model, {"model": "disk", "lm_head": "cpu"}, offload_dir=folder / "disk"),
    "from_pretrained": lambda model, folder: reloaded(model, folder),
}


def reloaded(model, folder):
    model.save_pretrained(folder / "packed")
    return AUTO.from_pretrained(folder / "packed", device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=folder / "disk")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("how", OFFLOAD)
def test_adapters_on_offloaded_experts_train(layout, tmp_path, how, checkpointing):
    """Gradients, and the outputs after a step, are those of the model in memory."""
    folder, _ = layout
    found = []
    for place in (None, how):
        model = quantized(folder, {"bits": 4, "double_quant": True})
        model = model if place is None else OFFLOAD[place](model, tmp_path)
        model = bnbq.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["o_proj", "experts"])
        torch.manual_seed(0)
        model = bnbq.get_peft_model(model, bnbq.lora_config(model, config)).train()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        gradients = {name: p.grad for name, p in trainable.items()}
        assert any("experts" in name for name in gradients) and all(g.abs().sum() > 0 for g in gradients.values())
        assert all(packed.qweight.is_meta == (place is not None) for packed in packed_experts(model).values())
        optimizer.step()
        found.append((gradients, logits(model.eval())))
    (wanted, after), (gradients, got) = found
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())
    assert torch.equal(got, after)


def test_merging_leaves_quantised_experts_whole_or_says_that_it_cannot(layout):
    folder, _ = layout
    model = quantized(folder, {"bits": 4})
    before = {name: packed.state_dict() for name, packed in packed_experts(model).items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    merged = bnbq.merge(peft.get_peft_model(model, config), keep="bf16").model
    for name, state in before.items():
        now = merged.get_submodule(name).state_dict()
        assert all(torch.equal(now[leaf], tensor) and now[leaf].dtype == tensor.dtype for leaf, tensor in state.items())
    assert logits(merged).isfinite().all()
    model = adapted(quantized(folder, {"bits": 4}), target_modules=["o_proj", "experts"])
    with pytest.raises(ValueError, match="adapts quantised experts"):
        bnbq.merge(model)
