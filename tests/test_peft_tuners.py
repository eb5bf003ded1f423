"""Each of PEFT's tuners on quantised bases: forward, backward, and merges that equal quantising the dense merge."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

from adapters import IDS, base_model, float_twin, quantized_layers  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = dict(target_modules=["q_proj", "down_proj"])
TUNERS = {
    "lora": peft.LoraConfig(r=4, init_lora_weights=False, **SOME),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, **SOME),
    "dora": peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **SOME),
    "olora": peft.LoraConfig(r=4, init_lora_weights="olora", **SOME),
    "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa", **SOME),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=2, total_step=10, init_lora_weights=False, **SOME),
    "loha": peft.LoHaConfig(r=4, init_weights=False, **SOME),
    "lokr": peft.LoKrConfig(r=4, init_weights=False, **SOME),
    "oft": peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, init_weights=False, **SOME),
    "boft": peft.BOFTConfig(boft_block_size=16, init_weights=False, **SOME),
    "hira": peft.HiraConfig(r=4, init_weights=False, **SOME),
    "fourierft": peft.FourierFTConfig(n_frequency=200, scaling=300.0, init_weights=False, **SOME),
    "hra": peft.HRAConfig(r=4, init_weights=False, **SOME),
    "randlora": peft.RandLoraConfig(r=4, randlora_alpha=30, init_weights=False, **SOME),
}
STARTS_IN_THE_BASE = {"olora", "pissa"}
"""Their initialisation moves a part of the weight into the adapter and requantises the rest."""


def adapted(source, kind, bits):
    torch.manual_seed(0)
    return peft.get_peft_model(base_model(source, f"{bits}bit"), copy.deepcopy(TUNERS[kind]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", TUNERS)
def test_forward_and_backward(source, kind, bits):
    """As on the float twin: outputs, and a gradient for every adapter that has one there.

    8 bits round the activations too, which weighs more than usual on a random model.
    """
    model = adapted(source, kind, bits)
    twin = float_twin(model)
    for one in (model, twin):
        one.train()
        one.output = one(IDS, labels=IDS)
        one.output.loss.backward()
    error = (model.output.logits - twin.output.logits).norm() / twin.output.logits.norm()
    assert error < (0.2 if bits == 8 else 1e-4), error
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    got, wanted = ({n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, twin))
    assert wanted and got.keys() == wanted.keys()
    got, wanted = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (got, wanted))
    assert torch.cosine_similarity(got, wanted, 0) > (0.9 if bits == 8 else 1 - 1e-5)


def codes_that_differ(model, twin):
    """(differing, all) codes between the model and quantising its twin's weights."""
    different = total = 0
    for path, layer in quantized_layers(model).items():
        wanted = layer.packed(twin.get_submodule(path).weight)["qweight"]
        different += (wanted != layer.qweight).sum().item()
        total += wanted.numel()
    return different, total


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", TUNERS)
def test_merge_and_unmerge_equal_quantising_the_dense_result(source, kind, bits, safe):
    model = adapted(source, kind, bits).eval()
    twin, before = float_twin(model), {p: m.qweight.clone() for p, m in quantized_layers(model).items()}
    if kind == "adalora":  # its forward counts steps otherwise
        model.base_model.peft_config["default"].total_step = None
    model.merge_adapter(safe_merge=safe)
    twin.merge_adapter(safe_merge=safe)
    different, total = codes_that_differ(model, twin)
    assert different <= total * 1e-4, (different, total)
    assert any(not torch.equal(before[p], m.qweight) for p, m in quantized_layers(model).items())
    for path, layer in quantized_layers(model).items():
        twin.get_submodule(path).weight.data = layer.dequantize()
    model.unmerge_adapter()
    twin.unmerge_adapter()
    different, total = codes_that_differ(model, twin)
    assert different <= total * 1e-4, (different, total)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", TUNERS)
def test_merge_and_unload(source, kind, bits):
    model = adapted(source, kind, bits).eval()
    twin = float_twin(model)
    for one in (model, twin):
        if kind == "adalora":
            one.base_model.peft_config["default"].total_step = None
    model, twin = model.merge_and_unload(), twin.merge_and_unload()
    different, total = codes_that_differ(model, twin)
    assert different <= total * 1e-4, (different, total)
    assert not any("adapter" in type(m).__module__ or hasattr(m, "base_layer") for m in model.modules())


@pytest.mark.parametrize("kind", sorted(STARTS_IN_THE_BASE))
def test_starts_that_move_weight_into_the_adapter_keep_the_model(source, kind):
    """Requantising the rest costs about what quantising it did: the adapted model is as near to the base as before."""
    base, model = base_model(source, "8bit"), adapted(source, kind, 8)
    with torch.no_grad():
        wanted, got = base(IDS).logits, model(IDS).logits
    assert (got - wanted).norm() / wanted.norm() < 0.05
