"""transformers' Conv1D, GPT-2's linear layer, whose weight is stored [in, out]: the layer of the transposed weight."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn  # noqa: E402
from hf import AUTO, IDS, assert_same, file_tensors, layers, logits, quantized  # noqa: E402

FORMATS = {"4bit": dict(bits=4), "4bit-dq": dict(bits=4, double_quant=True), "8bit": dict(bits=8)}
FORMAT = pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return small_models.gpt2(tmp_path_factory.mktemp("models") / "gpt2")


def linear_of(conv1d):
    linear = torch.nn.Linear(*conv1d.weight.shape)
    linear.weight, linear.bias = torch.nn.Parameter(conv1d.weight.detach().t().contiguous()), conv1d.bias
    return linear


@FORMAT
@pytest.mark.parametrize("k, n", [(64, 192), (72, 40)])
def test_is_the_layer_of_the_transposed_weight(settings, k, n):
    torch.manual_seed(0)
    conv1d = Conv1D(n, k)
    conv1d.bias.data.normal_()
    holder = torch.nn.Sequential(conv1d)
    bnbq.quantize_model(holder, bnbq.BnbqConfig(**settings))
    layer, wanted = holder[0], torch.nn.Sequential(linear_of(conv1d))
    bnbq.quantize_model(wanted, bnbq.BnbqConfig(**settings))
    assert (layer.in_features, layer.out_features) == (k, n) and layer.bias is conv1d.bias
    assert type(layer) is (nn.Linear8bitLt if settings["bits"] == 8 else nn.Linear4bit)
    x = torch.randn(2, 5, k)
    assert torch.equal(layer(x), wanted(x))
    assert_same(holder, wanted)


@FORMAT
def test_loads_saves_and_becomes_float_again(gpt2, tmp_path, settings):
    dense = AUTO.from_pretrained(gpt2)
    model = quantized(gpt2, settings)
    convs = {name: module for name, module in dense.named_modules() if isinstance(module, Conv1D)}
    assert set(layers(model)) == set(convs) and len(convs) == 8
    for name, layer in layers(model).items():
        wanted = type(layer).from_linear(linear_of(convs[name]), **layer.format())
        for leaf in layer.packed_spec():
            assert torch.equal(getattr(layer, leaf), getattr(wanted, leaf)), name
    in_memory = copy.deepcopy(dense)
    bnbq.quantize_model(in_memory, bnbq.BnbqConfig(**settings))
    assert_same(in_memory, model)
    for layout in ("bnbq", "bitsandbytes"):
        packed = quantized(gpt2, {**settings, "checkpoint_format": layout})
        packed.save_pretrained(tmp_path / layout)
        again = bnbq.from_pretrained(AUTO, tmp_path / layout)
        assert_same(again, model)
        assert torch.equal(logits(again), logits(model))
    stored = file_tensors(tmp_path / "bnbq")["transformer.h.0.mlp.c_fc.qweight"]
    assert stored.shape == ((256, 64) if settings["bits"] == 8 else (256, 32))  # [out, in]: one layout for all layers
    back = again.dequantize()
    assert [type(module) for module in back.modules()] == [type(module) for module in dense.modules()]
    for name, module in convs.items():
        assert back.get_submodule(name).weight.shape == module.weight.shape
        assert torch.equal(back.get_submodule(name).weight, layers(model)[name].dequantize().t())
    back.save_pretrained(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "back")), logits(back))


def qweights(model):
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("qweight")
    }


def train(base, fan_in_fan_out, steps=12):
    """LoRA on two kinds of layers: the model and the loss of each step."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, fan_in_fan_out=fan_in_fan_out, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@FORMAT
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_lora_trains_and_merges(gpt2, tmp_path, settings, fan_in_fan_out):
    """PEFT sees an nn.Linear: fan_in_fan_out, which is for Conv1D, is then without effect, as PEFT says."""
    peft = pytest.importorskip("peft")
    base = quantized(gpt2, settings)
    before = qweights(base)
    model, losses = train(base, fan_in_fan_out)
    on_floats = train(quantized(gpt2, settings).dequantize(), True)[1]
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(on_floats, rel=1e-4 if settings["bits"] == 4 else 0.06)
    after = qweights(model)
    assert after.keys() == {f"base_model.model.{name}" for name in before}
    assert all(torch.equal(after[f"base_model.model.{name}"], tensor) for name, tensor in before.items())

    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(gpt2, settings), tmp_path).eval()
    assert torch.equal(logits(again), trained)

    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    wanted = torch.nn.Linear(64, 256)
    wanted.weight = torch.nn.Parameter(layer.base_layer.dequantize() + layer.get_delta_weight("default"))
    merged = model.merge_and_unload()
    c_fc = merged.transformer.h[0].mlp.c_fc
    assert torch.equal(c_fc.qweight, type(c_fc).from_linear(wanted, **c_fc.format()).qweight)
    assert (logits(merged) - trained).norm() < (0.4 if settings["bits"] == 4 else 0.05) * trained.norm()


def test_gradients_equal_those_of_the_dequantised_model(gpt2):
    model = quantized(gpt2, dict(bits=4))
    back = copy.deepcopy(model).dequantize()
    gradients = []
    for one in (model, back):
        embeddings = one.transformer.wte(IDS).detach().requires_grad_()
        one(inputs_embeds=embeddings, labels=IDS).loss.backward()
        gradients.append(embeddings.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
