"""torch.compile and torch.export of whole layers and models: one graph, the same bits, any number of rows."""

import pytest
import torch
import transformers

from adapters import IDS, SETTINGS, base_model, lora, shake
from bnbq import nn

LAYERS = {
    "4bit": (nn.Linear4bit, {}),
    "4bit-dq": (nn.Linear4bit, {"double_quant": True}),
    "4bit-flat": (nn.Linear4bit, {"blocksize": 128}),  # blocks that cross rows
    "8bit": (nn.Linear8bitLt, {}),
    "8bit-blocks": (nn.Linear8bitLt, {"blocksize": 64}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    kind, settings = LAYERS[request.param]
    return kind(192, 48, **settings)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_layer_is_one_graph_for_any_number_of_rows(layer, requires_grad):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    layer.bias.requires_grad_(requires_grad)

    def check(m):
        x = torch.randn(m, 192)
        x[0, 5] = 9.0  # an outlier
        results = []
        for function in (compiled, layer):
            leaf = x.clone().requires_grad_(requires_grad)
            layer.bias.grad = None
            y = function(leaf)
            if requires_grad:
                y.square().sum().backward()
            results.append((y, leaf.grad, layer.bias.grad))
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert (results[0][1] is not None) == requires_grad

    check(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (2, 17, 64):
            check(m)


def test_an_exported_layer_runs_for_any_number_of_rows(layer, tmp_path):
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(layer, (torch.randn(4, 192),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2")
    assert again.state_dict.keys() == layer.state_dict().keys()
    for m in (1, 4, 31):
        x = torch.randn(m, 192)
        assert torch.equal(again.module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_step_is_one_graph_for_any_batch(source, name):
    """A model with adapters, forward and backward."""
    model = shake(lora(base_model(source, name))).train()
    inner = model.base_model.model.model
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager", dynamic=True)
    adapters = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    assert adapters

    def check(ids):
        results = []
        for function in (compiled, inner):
            model.zero_grad()
            hidden = function(ids, use_cache=False).last_hidden_state
            hidden.square().mean().backward()
            results.append({"hidden": hidden, **{n: p.grad for n, p in adapters.items()}})
        for n, a in results[0].items():
            assert (a - results[1][n]).norm() <= 1e-5 * results[1][n].norm(), n

    check(torch.arange(32).view(2, 16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(torch.arange(60).view(3, 20))


@pytest.mark.parametrize("name", SETTINGS)
def test_generate_compiles_with_a_static_cache(source, name):
    model = base_model(source, name).eval()
    arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = model.generate(IDS, **arguments)
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # generate compiles on accelerators only, unless a test says so
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(IDS, cache_implementation="static", compile_config=config, **arguments)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_model_computes_the_same(source, name):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = Logits(base_model(source, name).eval())
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (IDS,), dynamic_shapes=({1: length},))
    with torch.no_grad():
        for ids in (IDS, torch.arange(23)[None]):
            assert torch.equal(program.module()(ids), model(ids))
