"""bnbq.merge: what survives is measured and reported, too much loss is refused, and the exact ways are exact."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from adapters import (  # noqa: E402, F401
    AUTO,
    IDS,
    SETTINGS,
    base_model,
    logits,
    lora,
    packed,
    quantized_layers,
    shake,
)
from bnbq import nn  # noqa: E402
from bnbq.scale_search import requantize  # noqa: E402
from bnbq.side_branch import SideBranch, attach  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(source, name="4bit", size=0.2, **settings):
    return shake(lora(base_model(source, name), **settings), size=size)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ what is reported


@pytest.mark.parametrize("name", SETTINGS)
def test_the_report_is_what_happened(source, name):
    """asked, kept and noise, recomputed from the weights before and after."""
    model = adapted(source, name)
    expected = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.dequantize(torch.float32)
            expected[path] = weight, module.get_delta_weight("default").detach()
    merge = bnbq.merge(model, force=True)
    assert type(merge.model) is transformers.LlamaForCausalLM and not hasattr(merge.model, "peft_config")
    assert {row.name for row in merge.layers} == set(expected)
    for row in merge.layers:
        weight, delta = expected[row.name]
        change = merge.model.get_submodule(row.name).dequantize(torch.float32) - weight
        kept = ((change * delta).sum() / delta.square().sum()).item()
        noise = ((change - kept * delta).norm() / weight.norm()).item()
        assert row.kept == pytest.approx(kept, abs=1e-3) and row.noise == pytest.approx(noise, abs=1e-4)
        assert row.asked == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-3)
        assert row.becomes.startswith("int8" if name == "8bit" else "nf4")
    assert merge.worst.kept == min(row.kept for row in merge.layers)
    table = merge.text()
    assert "model.layers.*.mlp.up_proj x2, worst" in table and len(table.splitlines()) == 5
    assert len(merge.text(every=True).splitlines()) == 1 + len(merge.layers)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_small_adapter_does_not_survive_and_is_refused(source, name):
    model = adapted(source, name, size=0.002)
    before, output = state(model), logits(model)
    with pytest.raises(bnbq.MergeRefused, match="nothing was changed: 8 of 8 layers.*side-branch.*force=True") as error:
        bnbq.merge(model)
    assert error.value.merge.model is None and error.value.merge.worst.kept < 0.3
    assert error.value.merge.worst.name in str(error.value)
    assert same(before, state(model)) and torch.equal(logits(model), output)
    assert bnbq.merge(model, force=True).worst.kept < 0.3


def test_the_bound_is_the_callers(source):
    merge = bnbq.merge(adapted(source, "8bit"))  # large, and 8 bits: passes
    assert merge.worst.kept > 0.9
    with pytest.raises(bnbq.MergeRefused, match="less than 1.5"):
        bnbq.merge(adapted(source, "8bit"), min_kept=1.5)


@pytest.mark.parametrize("name", SETTINGS)
def test_searched_scales_are_nearer_than_packing_afresh(source, name):
    ours, theirs = adapted(source, name, size=0.1), adapted(source, name, size=0.1)
    wanted = {
        path: module.base_layer.dequantize() + module.get_delta_weight("default").detach()
        for path, module in ours.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    ours, theirs = bnbq.merge(ours, force=True).model, theirs.merge_and_unload()
    for path, dense in wanted.items():
        found, plain = ((m.get_submodule(path).dequantize() - dense).norm() for m in (ours, theirs))
        assert found < plain if name != "8bit" else found <= plain * 1.0001, path


# ------------------------------------------------------------------ scale search


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear4bit(128, 24),
        lambda: nn.Linear4bit(128, 24, quant_type="fp4", blocksize=32, double_quant=True),
        lambda: nn.Linear4bit(50, 3, quant_type="int4"),
        lambda: nn.Linear4bit(51, 3, double_quant=True),
        lambda: nn.Linear8bitLt(64, 24),
        lambda: nn.Linear8bitLt(100, 24, blocksize=64),
    ],
    ids=["nf4", "fp4-dq", "int4-flat", "nf4-flat-odd-dq", "int8", "int8-blocks"],
)
def test_requantize(layer):
    torch.manual_seed(0)
    layer = layer()
    weight = layer.dequantize(torch.float32)
    kept = copy.deepcopy(layer)
    kept._fill(requantize(layer, weight))
    assert torch.equal(kept.dequantize(), layer.dequantize())  # what is on the grid stays there
    assert all(torch.equal(kept._parameters[n], layer._parameters[n]) for n in layer.packed_spec() if n != "qweight")
    dense = weight + torch.randn_like(weight) * weight.std() * 0.2
    tensors = requantize(layer, dense)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == layer.packed_spec()
    found, plain = copy.deepcopy(layer), copy.deepcopy(layer).quantize_(dense)
    found._fill(tensors)
    assert (found.dequantize() - dense).norm() <= (plain.dequantize() - dense).norm() * 1.0001
    with pytest.raises(ValueError, match="nan"):
        requantize(layer, torch.full_like(weight, float("nan")))


def test_requantize_zeros_and_blocks_that_become_zero():
    layer = nn.Linear4bit(64, 2)
    tensors = requantize(layer, torch.zeros(2, 64))
    layer._fill(tensors)
    assert not layer.dequantize().any()
    layer._fill(requantize(layer, torch.ones(2, 64)))
    assert torch.equal(layer.dequantize(), torch.ones(2, 64))


# ------------------------------------------------------------------ side branch


@pytest.mark.parametrize("name", SETTINGS)
def test_side_branch_is_exact_and_keeps_the_base(source, tmp_path, name):
    model = adapted(source, name, size=0.01)
    expected, before = logits(model), packed(base_model(source, name))
    merge = bnbq.merge(model, "side-branch")
    assert torch.equal(logits(merge.model), expected)  # the scaling is a power of two
    assert all(row.kept == pytest.approx(1, abs=1e-4) and row.noise < 1e-6 for row in merge.layers)
    assert "rank 4" in str(merge) and same(packed(merge.model), before)
    assert not any(p.requires_grad for n, p in merge.model.named_parameters() if "side_branch" in n)

    output = logits(merge.model)
    merge.model.save_pretrained(tmp_path / "hf")
    again = AUTO.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), output) and same(state(again), state(merge.model))
    assert "SideBranch" in type(again.model.layers[0].mlp.up_proj).__name__

    bnbq.save(merge.model, tmp_path / "own")
    float_model = AUTO.from_pretrained(source)
    assert torch.equal(logits(bnbq.load(float_model, tmp_path / "own")), output)
    assert torch.equal(logits(copy.deepcopy(merge.model)), output)
    torch.save(merge.model.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(again), output)


def test_a_bf16_model_keeps_its_branch_in_float32(source, tmp_path):
    model = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(), dtype=torch.bfloat16)
    model = shake(lora(model), size=0.01)
    expected = logits(model)
    merge = bnbq.merge(model, "side-branch")
    output = logits(merge.model)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    merge.model.save_pretrained(tmp_path)
    again = AUTO.from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.up_proj.side_branch.a.dtype == torch.float32
    assert torch.equal(logits(again), output)
    from accelerate import init_empty_weights

    with init_empty_weights():
        empty = AUTO.from_config(transformers.AutoConfig.from_pretrained(source, dtype=torch.bfloat16))
    again = bnbq.load_and_quantize(empty, bnbq.BnbqConfig(), tmp_path)
    assert again.model.layers[0].mlp.up_proj.side_branch.a.dtype == torch.float32
    assert torch.equal(logits(again), output)


def test_a_branch_under_the_hooks_of_a_dispatched_model(source, tmp_path):
    """Accelerate's hooks call the forward that a layer had when they came."""
    import accelerate

    devices = {"model": "cpu", "lm_head": "disk"}
    model = accelerate.dispatch_model(base_model(source, "4bit"), devices, offload_dir=tmp_path)
    assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    model = shake(lora(model), size=0.2)
    expected = logits(model)
    assert torch.equal(logits(bnbq.merge(model, "side-branch").model), expected)


@pytest.mark.parametrize("kind", [nn.Linear4bit, nn.Linear8bitLt])
def test_the_weight_of_a_layer_with_a_branch(kind):
    """Reading gives both parts; writing packs the difference; a second branch joins the first."""
    torch.manual_seed(0)
    layer, a, b = kind(64, 24), torch.randn(3, 64), torch.randn(24, 3) * 0.1
    plain, x = layer.dequantize(), torch.randn(5, 64)
    attach(layer, a, b)
    assert torch.allclose(layer.weight.data, plain + b @ a, atol=1e-6)
    bound = 1e-5 if kind is nn.Linear4bit else 0.05
    assert (layer(x) - x @ (plain + b @ a).T - layer.bias).norm() < bound * layer(x).norm()
    layer.weight.data += 1
    assert (layer.dequantize() - plain - b @ a - 1).norm() < 0.2 * (plain + 1).norm()
    attach(layer, a, -b)
    assert layer.side_branch.a.shape == (6, 64) and layer.side_branch.product().abs().max() < 1e-5
    other = kind(64, 24)
    attach(other, a, b)
    wanted = other.weight.data.clone()
    layer.weight = other.weight
    assert (layer.dequantize() - wanted).norm() < 0.2 * wanted.norm()
    assert "LowRank(rank=6" in repr(layer) and layer.half().side_branch.a.dtype == torch.float16
    with pytest.raises(ValueError, match=r"float32 \[3, 63\].*\[r, 64\]"):
        attach(layer, torch.zeros(3, 63), torch.zeros(24, 3))


def test_merging_onto_a_branch(source):
    """A second adapter, in each way; what the first one became is not lost."""
    first = bnbq.merge(adapted(source, size=0.01), "side-branch").model
    before = logits(first)
    for keep in ("side-branch", "quantized", "bf16"):
        model = shake(lora(copy.deepcopy(first), seed=5), seed=6, size=0.2)
        expected = logits(model)
        merge = bnbq.merge(model, keep, force=True)
        bound = {"side-branch": 1e-4, "quantized": 0.4, "bf16": 0.05}[keep]
        assert (logits(merge.model).float() - expected).norm() < bound * expected.norm(), keep
        assert any(isinstance(m, SideBranch) for m in merge.model.modules()) == (keep != "bf16")
    assert torch.equal(logits(first), before)


def test_bitsandbytes_format_has_no_place_for_a_branch(source, tmp_path):
    config = bnbq.BnbqConfig(checkpoint_format="bitsandbytes")
    model = AUTO.from_pretrained(source, quantization_config=config)
    merged = bnbq.merge(shake(lora(model)), "side-branch").model
    with pytest.raises(ValueError, match="side branch, for which bitsandbytes"):
        merged.save_pretrained(tmp_path)


def test_a_damaged_branch_in_a_checkpoint_is_an_error(source, tmp_path):
    from safetensors.torch import load_file, save_file

    bnbq.merge(adapted(source), "side-branch").model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.side_branch"
    for damaged in ({f"{key}.b": None}, {f"{key}.a": None}, {f"{key}.a": torch.zeros(4, 5)}):
        changed = {name: t for name, t in {**tensors, **damaged}.items() if t is not None}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=key):
            AUTO.from_pretrained(tmp_path)


# ------------------------------------------------------------------ bf16


def test_bf16(source, tmp_path):
    for targets in (["q_proj", "up_proj"], "all-linear"):
        model = adapted(source, size=0.01, target_modules=targets)
        expected = logits(model)
        merge = bnbq.merge(model, "bf16")
        assert all(row.kept == pytest.approx(1, abs=0.05) and row.noise < 0.003 for row in merge.layers)
        layer = merge.model.model.layers[0].mlp.up_proj
        assert type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16
        assert (logits(merge.model).float() - expected).norm() < 0.05 * expected.norm()
        merge.model.save_pretrained(tmp_path / targets[0])
        again = AUTO.from_pretrained(tmp_path / targets[0])
        assert torch.equal(logits(again), logits(merge.model))
        assert hasattr(again, "hf_quantizer") == (targets != "all-linear")


def test_bf16_of_transposed_layers(tmp_path):
    """GPT-2's Conv1D: the float layer is one again, and its file loads."""
    folder = small_models.gpt2(tmp_path / "gpt2")
    model = AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    model = shake(lora(model, target_modules=["c_attn", "c_proj"]), size=0.01)
    expected = logits(model)
    merged = bnbq.merge(model, "bf16").model
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert (logits(merged).float() - expected).norm() < 0.05 * expected.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "merged")), logits(merged))


# ------------------------------------------------------------------ other adapters and models


@pytest.mark.parametrize("keep", ["quantized", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
        peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=16, use_cayley_neumann=False, init_weights=False),
    ],
    ids=["dora", "ia3", "loha", "oft"],
)
def test_other_tuners(source, config, keep):
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(source, "8bit"), copy.deepcopy(config)).eval()
    before, expected = state(model), logits(model)
    with pytest.raises(ValueError, match="layers.0.*'side-branch' is for LoRA without variants"):
        bnbq.merge(model, "side-branch")
    assert same(before, state(model))
    merge = bnbq.merge(model, keep, force=True)
    assert (logits(merge.model).float() - expected).norm() < 0.1 * expected.norm()


def test_two_adapters_and_a_bias(source):
    for keep in ("quantized", "side-branch", "bf16"):
        model = adapted(source, "8bit", size=0.05)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        expected = logits(model)
        merge = bnbq.merge(model, keep, force=True)
        assert (logits(merge.model).float() - expected).norm() < 0.1 * expected.norm(), keep
    block = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
    bnbq.quantize_model(block, bnbq.BnbqConfig(blocksize=32))
    model = peft.get_peft_model(
        block, peft.LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True, init_lora_weights=False)
    )
    x = torch.randn(3, 64)
    for keep, bound in (("side-branch", 1e-5), ("bf16", 0.03)):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            expected, merged = copied(x), bnbq.merge(copied, keep).model
            got = merged(x.to(torch.bfloat16 if keep == "bf16" else torch.float32)).float()
        assert (got - expected).norm() < bound * expected.norm()


def test_an_adapter_on_float_layers_is_merged_too(source):
    model = adapted(source, target_modules=[*["q_proj"], "lm_head"])
    expected = logits(model)
    merged = bnbq.merge(model, "side-branch").model
    assert type(merged.lm_head) is torch.nn.Linear
    assert torch.allclose(logits(merged), expected, rtol=1e-3, atol=1e-4)


def test_an_untrained_adapter_changes_nothing(source):
    before = packed(base_model(source, "4bit-dq"))
    merge = bnbq.merge(lora(base_model(source, "4bit-dq")))
    assert all(row.kept == 1 and row.noise == 0 and row.asked == 0 for row in merge.layers)
    assert same(packed(merge.model), before)


def test_what_cannot_be_merged(source, tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM, expected a PeftModel"):
        bnbq.merge(base_model(source, "4bit"))
    prompt = peft.get_peft_model(
        base_model(source, "4bit"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(TypeError, match="not a prompt"):
        bnbq.merge(prompt)
    model = adapted(source)
    with pytest.raises(ValueError, match="keep is 'float', expected one of 'quantized', 'side-branch', 'bf16'"):
        bnbq.merge(model, "float")
    before = state(model)
    weight = model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight
    good = weight[0, 0].item()
    weight.data[0, 0] = float("inf")
    for keep in ("quantized", "side-branch", "bf16"):
        with pytest.raises(ValueError, match="layers.1.mlp.up_proj.lora_B.default.weight of the adapter is not finite"):
            bnbq.merge(model, keep, force=True)
    weight.data[0, 0] = good
    assert same(before, state(model))
    model.merge_adapter()
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: default is merged already"):
        bnbq.merge(model)
