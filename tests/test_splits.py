"""Where layers lie, and with which rows they are called, changes no logit; a CUDA device changes them by rounding."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from hf import AUTO, logits  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread", "batch_invariant")]

SETTINGS = {"nf4": dict(bits=4), "nf4 dq": dict(bits=4, double_quant=True), "int8": dict(bits=8)}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
SPLITS = {
    "the first layer": {"model.layers.0"},
    "the second layer and the head": {"model.layers.1", "lm_head"},
    "the embedding": {"model.embed_tokens"},
    "both layers": {"model.layers.0", "model.layers.1"},
}
IDS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", initializer_range=0.3)


def load(source, name, dtype, **kwargs):
    settings = bnbq.BnbqConfig(**SETTINGS[name])
    return AUTO.from_pretrained(source, quantization_config=settings, dtype=dtype, **kwargs).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_split_gives_the_same_logits(source, name, dtype, tmp_path):
    whole = logits(load(source, name, dtype), IDS)
    for i, (split, far) in enumerate(SPLITS.items()):
        device_map = {part: "disk" if part in far else "cpu" for part in PARTS}
        model = load(source, name, dtype, device_map=device_map, offload_folder=str(tmp_path / str(i)))
        assert any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(logits(model, IDS), whole), split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_gives_a_row_the_same_output_in_any_batch(source, name, dtype):
    """All layers of a model, called with what they see in it; attention and norms are torch's."""
    model, seen = load(source, name, dtype), {}

    def look(layer, args, y):
        seen[layer] = args[0].flatten(0, 1), y.flatten(0, 1)

    layers = [module for module in model.modules() if isinstance(module, (bnbq.nn.Linear4bit, bnbq.nn.Linear8bitLt))]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    logits(model, IDS)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) == 14
    for layer, (x, y) in seen.items():
        for first, last in ((0, 1), (7, 9), (50, 67)):
            with torch.no_grad():
                assert torch.equal(layer(x[first:last]), y[first:last]), layer
