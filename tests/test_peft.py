"""Unmodified PEFT on quantised bases: adapters train, save and load; merging equals quantising the dense merge."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
from adapters import (  # noqa: E402, F401
    AUTO,
    IDS,
    SETTINGS,
    TARGETS,
    base_model,
    float_twin,
    logits,
    lora,
    packed,
    shake,
)
from bnbq.report import count_parameters, print_trainable_parameters  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_those_through_the_dequantised_weight(source, name):
    model = lora(base_model(source, name))
    shake(model)
    dense = float_twin(model)
    for twin in (model, dense):
        twin(IDS, labels=IDS).loss.backward()
    wanted = dict(dense.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            error = (parameter.grad - wanted[path].grad).norm() / wanted[path].grad.norm()
            assert error < (0.05 if name == "8bit" else 1e-3), (path, error)


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_save_and_load(source, tmp_path, name):
    model = lora(base_model(source, name))
    shake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("qweight" in key for key in peft.utils.load_peft_weights(tmp_path, device="cpu"))
    again = peft.PeftModel.from_pretrained(base_model(source, name), tmp_path)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base_model(source, name)))
    base = base_model(source, name)
    base.load_adapter(tmp_path)  # Transformers' own door to PEFT
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_are_swapped_and_stacked(source, tmp_path, name):
    """Two adapters on one base: each alone, both at once, a mixed batch, and none, as on the float twin."""
    singles = {}
    for i, adapter in enumerate(("first", "second")):
        model = shake(lora(base_model(source, name)), seed=i + 1)
        singles[adapter] = logits(model)
        model.save_pretrained(tmp_path / adapter)
    model = peft.PeftModel.from_pretrained(base_model(source, name), tmp_path / "first", adapter_name="first")
    before = packed(model)
    model.load_adapter(tmp_path / "second", "second")
    for adapter in ("second", "first", "second"):
        model.set_adapter(adapter)
        assert torch.equal(logits(model), singles[adapter])
    both = IDS.repeat(2, 1)
    with torch.no_grad():
        mixed = model.eval()(both, adapter_names=["first", "__base__"]).logits
    assert torch.allclose(mixed[:1], singles["first"], rtol=1e-3, atol=0.3 if name == "8bit" else 1e-4)
    model.base_model.set_adapter(["first", "second"])
    stacked, wanted = logits(model), logits(float_twin(model))
    assert (stacked - wanted).norm() / wanted.norm() < (0.05 if name == "8bit" else 1e-4)
    assert not torch.equal(stacked, singles["first"])
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits(model), singles["second"])
    assert all(torch.equal(before[key], value) for key, value in packed(model).items())
    assert torch.equal(logits(model.unload()), logits(base_model(source, name)))


def delta(layer):
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("name", SETTINGS)
def test_merge_equals_quantising_the_dense_merge(source, tmp_path, name, safe):
    model = lora(base_model(source, name))
    shake(model)
    wanted = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            base = module.base_layer
            dense = base.dequantize() + delta(module).detach()
            wanted[path] = {n: t.clone() for n, t in copy.deepcopy(base).quantize_(dense).named_parameters()}
    unmerged, before = logits(model), packed(model)
    model.merge_adapter(safe_merge=safe)
    for path, tensors in wanted.items():
        for leaf, tensor in tensors.items():
            assert torch.equal(model.get_submodule(path).base_layer.get_parameter(leaf), tensor), (path, leaf)
    assert any(not torch.equal(before[key], value) for key, value in packed(model).items())
    merged = logits(model)
    assert (merged - unmerged).norm() / unmerged.norm() < (0.06 if name == "8bit" else 0.4)
    model.unmerge_adapter()
    assert (logits(model) - unmerged).norm() / unmerged.norm() < (0.08 if name == "8bit" else 0.5)

    fresh = lora(base_model(source, name))
    shake(fresh)
    plain = fresh.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(plain), merged) and not any(hasattr(m, "lora_A") for m in plain.modules())
    plain.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "merged")), merged)


def test_a_merge_that_is_not_finite_is_refused(source):
    model = lora(base_model(source, "4bit"))
    shake(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    before = packed(model)
    for safe in (True, False):
        with pytest.raises(ValueError):
            model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(before[key], value) for key, value in packed(model).items())


@pytest.mark.parametrize("prepare", ["theirs", "ours"])
def test_prepare(source, prepare):
    model = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(), dtype=torch.bfloat16)
    before = packed(model)
    if prepare == "theirs":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        assert model.model.norm.weight.dtype == torch.float32
    else:
        assert (
            bnbq.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True}) is model
        )
        assert model.model.norm.weight.dtype == torch.bfloat16 and model.is_activation_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(before[key], value) and before[key].dtype == value.dtype for key, value in packed(model).items()
    )
    model = lora(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    plain = bnbq.prepare_model_for_kbit_training(base_model(source, "4bit"), use_gradient_checkpointing=False)
    assert not plain.is_activation_checkpointing


def test_parameters_are_counted_as_the_float_model_has_them(source, capsys):
    wanted = sum(p.numel() for p in base_model(source, "float").parameters())
    for name in SETTINGS:
        model = base_model(source, name)
        assert count_parameters(model) == wanted
    model = lora(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model, trainable=True) == trainable
    assert count_parameters(model) == wanted + trainable
    print_trainable_parameters(model)
    assert f"trainable params: {trainable:,d} || all params: {wanted + trainable:,d}" in capsys.readouterr().out


def test_seven_billion(capsys):
    """LoRA of rank 16 on all attention projections of Llama-7B: a fifth of a percent, whether 4-bit or float."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        bnbq.quantize_model(model, bnbq.BnbqConfig())
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )
    trainable, total = count_parameters(model, trainable=True), count_parameters(model)
    assert total - trainable == 6_738_415_616 and 0.001 < trainable / total < 0.005
