"""Unmodified PEFT on models with packed experts: gradients through them, and adapters on them."""

import copy

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


def test_merging_beside_experts_leaves_them_as_they_are(layout):
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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_adapters_on_experts_are_merged_expert_by_expert(layout, settings, tmp_path):
    """Each row, recomputed from the weights before and after; float experts hold what the adapters computed."""
    folder, _ = layout
    model = adapted(quantized(folder, settings), target_modules=["o_proj", "experts"])
    expected, wanted, before = logits(model), {}, {}
    for name, module in model.get_base_model().named_modules():
        for leaf, _ in module.pairs().items() if hasattr(module, "pairs") else ():
            packed = getattr(module.base_layer, leaf)
            before[f"{name}.{leaf}"] = packed.dequantize(torch.float32)
            wanted[f"{name}.{leaf}"] = module.get_delta_weight(leaf, "default").detach()
    with pytest.raises(ValueError, match="adapts quantised experts, which have no side branch.*'bf16'"):
        bnbq.merge(model, "side-branch")
    with pytest.raises(bnbq.MergeRefused, match="nothing was changed"):
        bnbq.merge(model, min_kept=1.5)
    assert torch.equal(logits(model), expected)
    other = copy.deepcopy(model)

    merge = bnbq.merge(model, force=True)
    rows = {row.name: row for row in merge.layers if "experts" in row.name}
    assert rows.keys() == {f"{name}.{e}" for name, delta in wanted.items() for e in range(len(delta))}
    assert f"x{len([n for n in rows if 'down_proj' in n])}, worst" in str(merge)
    for name, delta in wanted.items():
        packed = merge.model.get_submodule(name)
        change = packed.dequantize(torch.float32) - before[name]
        for e in range(len(delta)):
            row, asked = rows[f"{name}.{e}"], delta[e]
            kept = ((change[e] * asked).sum() / asked.square().sum()).item()
            noise = ((change[e] - kept * asked).norm() / before[name][e].norm()).item()
            assert row.kept == pytest.approx(kept, abs=1e-3) and row.noise == pytest.approx(noise, abs=1e-4)
            assert row.asked == pytest.approx((asked.norm() / before[name][e].norm()).item(), rel=1e-3)
            assert row.kept > 0.9 and row.becomes.startswith(settings.get("quant_type", "int8" if settings["bits"] == 8 else "nf4"))
        afresh = copy.deepcopy(packed).quantize_(before[name] + delta).dequantize(torch.float32)
        found, plain = ((weight - before[name] - delta).norm() for weight in (packed.dequantize(torch.float32), afresh))
        assert found <= plain * 1.0001  # scales are searched
    merge.model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "packed")), logits(merge.model))

    merge = bnbq.merge(other, "bf16")
    assert all(row.kept == pytest.approx(1, abs=0.05) and row.noise < 0.003 * (1 + row.asked) for row in merge.layers)
    for name, delta in wanted.items():
        weight = merge.model.get_parameter(name)
        assert weight.dtype == torch.bfloat16 and torch.allclose(weight.float(), before[name] + delta, rtol=2**-8, atol=1e-6)
    assert not packed_experts(merge.model) and (logits(merge.model).float() - expected).norm() < 0.05 * expected.norm()
    merge.model.save_pretrained(tmp_path / "float")
    again, info = AUTO.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not packed_experts(again)
    assert torch.allclose(logits(again), logits(merge.model), rtol=0.02, atol=0.02)


def test_an_untrained_adapter_on_experts_changes_nothing(layout):
    folder, _ = layout
    model = quantized(folder, {"bits": 4, "double_quant": True})
    before = {name: {leaf: tensor.clone() for leaf, tensor in packed.state_dict().items()} for name, packed in packed_experts(model).items()}
    config = peft.LoraConfig(r=4, target_modules=["experts"])
    merge = bnbq.merge(peft.get_peft_model(model, bnbq.lora_config(model, config)))
    assert all(row.kept == 1 and row.noise == 0 and row.asked == 0 for row in merge.layers)
    for name, state in before.items():
        now = merge.model.get_submodule(name).state_dict()
        assert all(torch.equal(now[leaf], tensor) for leaf, tensor in state.items())
