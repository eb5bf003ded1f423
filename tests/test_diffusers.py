"""diffusers' transformers: plain modules to bnbq, quantised in place, saved and loaded with bnbq.save and bnbq.load."""

import copy

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import bnbq  # noqa: E402
from bnbq import nn  # noqa: E402

TINY = dict(attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, num_layers=2)
MODELS = {
    "flux": (
        "FluxTransformer2DModel",
        dict(patch_size=1, in_channels=16, num_single_layers=1, axes_dims_rope=(4, 4, 8)),
        dict(hidden_states=(1, 16, 16), img_ids=(16, 3), txt_ids=(6, 3)),
    ),
    "sd3": (
        "SD3Transformer2DModel",
        dict(sample_size=8, in_channels=4, caption_projection_dim=64, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm"),
        dict(hidden_states=(1, 4, 8, 8)),
    ),
}
BITS = {"4bit": dict(bits=4), "4bit-dq": dict(bits=4, double_quant=True), "8bit": dict(bits=8)}


@pytest.fixture(params=MODELS)
def model(request):
    name, settings, _ = MODELS[request.param]
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**TINY, **settings).eval()
    made.shapes = dict(encoder_hidden_states=(1, 6, 32), pooled_projections=(1, 32), **MODELS[request.param][2])
    return made


@torch.no_grad()
def run(model, shapes):
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return model(**inputs, timestep=torch.tensor([0.5])).sample


@pytest.mark.parametrize("settings", BITS.values(), ids=BITS)
def test_quantises_computes_saves_and_loads(model, tmp_path, settings):
    dense, shapes = copy.deepcopy(model), model.shapes
    report = bnbq.quantize_model(model, bnbq.BnbqConfig(**settings))
    linears = {name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {row.name for row in report.quantized} == linears and len(linears) > 30 and report.fraction > 0.95
    expected = run(dense, shapes)
    result = run(model, shapes)
    assert 0 < (result - expected).norm() < (0.2 if settings["bits"] == 4 else 0.02) * expected.norm()

    # What is left is the quantisation error: the float model with the dequantised weights gives the same.
    for name in linears:
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    same = run(dense, shapes)
    assert (result - same).norm() < (1e-4 if settings["bits"] == 4 else 0.02) * same.norm()

    bnbq.save(model, tmp_path)
    again = bnbq.load(type(model).from_config(model.config), tmp_path).eval()
    assert torch.equal(run(again, shapes), result)
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    assert all(isinstance(bnbq.load(empty, tmp_path).get_submodule(name), nn.QuantizedLinear) for name in linears)


def test_moves_casts_and_copies(model):
    shapes = model.shapes
    bnbq.quantize_model(model, bnbq.BnbqConfig())
    expected = run(model, shapes)
    assert model.dtype == torch.float32 and torch.equal(run(copy.deepcopy(model), shapes), expected)
    model.to("cpu", torch.bfloat16).to(torch.float32)
    assert (run(model, shapes) - expected).norm() < 0.02 * expected.norm()  # norms and biases were rounded


def test_save_pretrained_is_refused(model, tmp_path):
    """diffusers would write files that its from_pretrained reads as random weights."""
    bnbq.quantize_model(model, bnbq.BnbqConfig())
    with pytest.raises(ValueError, match="use bnbq.save"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
