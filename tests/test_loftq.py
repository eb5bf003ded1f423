"""bnbq.init_loftq: adapters start as the best low-rank part of what quantising lost, read layer by layer."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from adapters import AUTO, SETTINGS, assert_packed, base_model, logits, lora, packed  # noqa: E402, F401
from bnbq import shards  # noqa: E402
from bnbq.errors import UserError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SETTINGS)
def test_nearer_to_the_float_model(source, name):
    model = lora(base_model(source, name), r=8)
    before, exact = packed(model), logits(base_model(source, "float"))
    plain = (logits(model) - exact).norm()
    random_state = torch.random.get_rng_state()
    gained = bnbq.init_loftq(model)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert_packed(model, before)
    assert (logits(model) - exact).norm() < plain * (0.95 if name == "8bit" else 0.9)
    weights = AUTO.from_pretrained(source)
    for path, start in gained.items():
        tuner = model.get_base_model().get_submodule(path)
        weight = weights.get_submodule(path).weight.detach()
        lost = weight - tuner.base_layer.dequantize()
        left = lost - tuner.get_delta_weight("default").detach()
        best = torch.linalg.svdvals(lost)[8:].norm()
        assert left.norm() <= best * 1.01 and start.error == pytest.approx((left.norm() / weight.norm()).item(), rel=1e-3)
        assert start.without == pytest.approx((lost.norm() / weight.norm()).item(), rel=1e-3) and start.error < start.without


def test_sources_are_alike_and_streamed(source, tmp_path, monkeypatch):
    """A directory (sharded or not), the float model, and the directory that the base came from."""
    AUTO.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="90KB")
    read = []
    tensor = shards.Source.tensor
    monkeypatch.setattr(shards.Source, "tensor", lambda self, file, key: read.append(key) or tensor(self, file, key))
    results = []
    for given in (None, source, str(tmp_path / "shards"), AUTO.from_pretrained(source)):
        model = lora(base_model(source, "4bit"))
        bnbq.init_loftq(model, given)
        results.append(logits(model))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(read) == 3 * 8 and len(set(read)) == 8  # nothing is read but what is needed, and that once


def test_scaling_and_rank(source):
    """What matters is the product: lora_alpha does not change it, and a rank beyond the layer's is filled up."""
    a, b = (lora(base_model(source, "4bit"), lora_alpha=alpha) for alpha in (4, 32))
    for model in (a, b):
        bnbq.init_loftq(model)
    assert torch.allclose(logits(a), logits(b), atol=1e-4)
    whole = lora(base_model(source, "4bit"), r=100, target_modules=["q_proj"])
    assert all(start.error < 1e-5 for start in bnbq.init_loftq(whole).values())


def test_transposed_layers(tmp_path):
    folder = small_models.gpt2(tmp_path / "gpt2")
    model = AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
    model = lora(model, target_modules=["c_attn", "c_proj"])
    gained = bnbq.init_loftq(model)
    assert len(gained) == 6 and all(start.error < start.without < 0.2 for start in gained.values())


def test_callback_takes_a_start_back(source):
    model = lora(base_model(source, "4bit"))
    kept = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach().clone()
    seen = []
    gained = bnbq.init_loftq(model, callback=lambda model, name: seen.append(name) or "layers.0" not in name)
    assert seen == list(gained) and len(seen) == 8
    layers = model.get_base_model().model.layers
    assert torch.equal(layers[0].self_attn.q_proj.lora_A["default"].weight, kept)
    assert not layers[0].self_attn.q_proj.lora_B["default"].weight.any()
    assert layers[1].self_attn.q_proj.lora_B["default"].weight.any()


def test_errors(source, tmp_path):
    with pytest.raises(TypeError, match="expected a PeftModel"):
        bnbq.init_loftq(base_model(source, "4bit"))
    with pytest.raises(ValueError, match="no quantised layer has a LoRA adapter 'default'"):
        bnbq.init_loftq(lora(base_model(source, "float")))
    with pytest.raises(ValueError, match="q_proj: its adapter is a DoraLinearVariant"):
        bnbq.init_loftq(lora(base_model(source, "4bit"), use_dora=True))
    model = lora(base_model(source, "4bit"))
    with pytest.raises(UserError, match="no model.safetensors"):
        bnbq.init_loftq(model, tmp_path)
    model.get_base_model().config._name_or_path = "some/hub-name"
    with pytest.raises(ValueError, match="'some/hub-name', which is no directory here"):
        bnbq.init_loftq(model)
    other = small_models.llama(tmp_path / "other", dtype=torch.float32, hidden_size=128)
    with pytest.raises(ValueError, match=r"q_proj: the float weight is float32 \[128, 128\], expected shape \[64, 64\]"):
        bnbq.init_loftq(model, other)
    fewer = small_models.llama(tmp_path / "fewer", dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no float weight of its own for model.layers.1.mlp.down_proj"):
        bnbq.init_loftq(model, fewer)
