"""`to_bnbq` and `from_bnbq`: layers and embeddings of the facade and of bnbq.nn, each the other's bytes."""

import pickle

import pytest

torch = pytest.importorskip("torch")

import bnbq  # noqa: E402
import bnbq.bitsandbytes as bnb  # noqa: E402
from bnbq import nn, side_branch  # noqa: E402
from test_facade_layers import EMBEDDINGS, FLOATS, same  # noqa: E402


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_native_layers_become_the_facades_and_back(quant_type, double_quant, blocksize):
    layer = nn.Linear4bit(256, 24, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize,
                          compute_dtype="bfloat16", weight_dtype=torch.bfloat16)
    facade = bnb.from_bnbq(layer).eval()
    assert facade.weight.data_ptr() == layer.qweight.data_ptr() and facade.bias is layer.bias
    x = torch.randn(3, 256)
    assert torch.equal(facade(x), layer(x)) and facade.compute_dtype == torch.bfloat16
    back = bnb.to_bnbq(facade)
    assert back.format() == layer.format() and back.weight_dtype == torch.bfloat16 and not back.training
    assert {k: v.tolist() for k, v in back.state_dict().items()} == {k: v.tolist() for k, v in layer.state_dict().items()}
    assert not any(p.requires_grad for name, p in back.named_parameters() if name != "bias")


def tensors(module):
    return {key: (value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist())
            for key, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_become_native_ones_and_back(name, dtype):
    layer = EMBEDDINGS[name](dtype=dtype).to("cpu").eval()
    layer.padding_idx = 3
    ids = torch.tensor([[0, 19], [7, 7]])
    native = bnb.to_bnbq(layer)
    assert type(native) is (nn.Embedding8bit if name == "int8" else nn.Embedding4bit) and not native.training
    assert native.qweight.data_ptr() == layer.weight.data_ptr() and native.weight_dtype == dtype
    assert torch.equal(native(ids), layer(ids)) and native(ids).dtype == dtype
    assert nn_copy(native).load_state_dict(native.state_dict()).missing_keys == []
    back = bnb.from_bnbq(native)
    assert back.weight.data_ptr() == layer.weight.data_ptr() and back.dtype == dtype and back.padding_idx == 3
    if name != "nf4":  # which stores its bytes as float32
        assert tensors(back) == tensors(layer)
    assert torch.equal(back(ids), layer(ids)) and not back.training
    assert tensors(bnb.to_bnbq(back)) == tensors(native)


def nn_copy(layer):
    return type(layer)(*layer.weight_shape, weight_dtype=layer.weight_dtype, **layer.format())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize, k", [(32, 64), (128, 256), (64, 50)])
def test_native_embeddings_become_the_facades_and_back(blocksize, k, double_quant):
    layer = nn.Embedding4bit(20, k, quant_type="fp4", blocksize=blocksize, double_quant=double_quant, weight_dtype=torch.bfloat16)
    facade, ids = bnb.from_bnbq(layer), torch.tensor([19, 0, 5])
    assert type(facade) is bnb.nn.Embedding4bit and torch.equal(facade(ids), layer(ids))
    assert same(facade, pickle.loads(pickle.dumps(facade))) and facade.quant_state.nested == double_quant
    assert tensors(bnb.to_bnbq(facade)) == tensors(layer)


@pytest.mark.parametrize("kind", [nn.Linear4bit, nn.Linear8bitLt, nn.Embedding4bit, nn.Embedding8bit])
def test_protected_scales_are_scales_again(kind):
    layer = kind(8, 64)
    wanted = tensors(bnb.from_bnbq(layer))
    assert tensors(bnb.from_bnbq(bnbq.protect_scales(layer))) == wanted


@pytest.mark.parametrize("bits", [4, 8])
def test_models_are_converted_in_place(bits):
    shared = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    model = torch.nn.ModuleDict({
        "a": torch.nn.Sequential(bnb.nn.LinearNF4(64, 64), shared), "b": shared,
        "e": bnb.nn.Embedding4bit(4, 64) if bits == 4 else bnb.nn.Embedding8bit(4, 64),
        "head": bnb.nn.Linear4bit(64, 4) if bits == 4 else bnb.nn.Linear8bitLt(64, 4, has_fp16_weights=False),
    }).to("cpu")
    model["head"].weight = model["e"].weight
    called = []
    model["head"].register_forward_hook(lambda *_: called.append(1))

    def outputs():
        return model["a"](x), model["e"](torch.tensor([1, 3])), model["head"](x)

    x = torch.randn(2, 64)
    wanted = outputs()
    assert bnb.to_bnbq(model) is model
    assert isinstance(model["a"][0], nn.Linear4bit) and model["b"] is model["a"][1] and model["b"].threshold == 6.0
    assert model["head"].qweight is model["e"].qweight and isinstance(model["e"], nn.QuantizedEmbedding)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), wanted, strict=True))
    assert bnb.from_bnbq(model) is model and type(model["a"][0]) is bnb.nn.Linear4bit
    assert model["head"].weight is model["e"].weight
    assert all(torch.equal(a, b) for a, b in zip(outputs(), wanted, strict=True))
    assert len(called) == 3


def dispatched(layer):
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    return layer


def with_buffer(layer):
    layer.register_buffer("scale", torch.ones(1))
    return layer


def branched(layer):
    side_branch.attach(layer, torch.ones(2, 64), torch.ones(4, 2))
    return layer


class Doubled(bnb.nn.LinearNF4):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize("convert, layer, message", [
    (bnb.to_bnbq, bnb.nn.Linear4bit(64, 4), "1: Linear4bit.* is not quantised yet"),
    (bnb.to_bnbq, bnb.nn.Linear8bitLt(64, 4), "1: the weight is not quantised .has_fp16_weights=True"),
    (bnb.to_bnbq, bnb.nn.Embedding4bit(4, 64), "1: Embedding4bit.* is not quantised yet"),
    (bnb.to_bnbq, bnb.nn.Embedding8bit(4, 64), "1: the weight is not quantised .move it to a device"),
    (bnb.to_bnbq, bnb.nn.Embedding4bit(4, 64).half().to("cpu"),
     "1: its rows are decoded in torch.float16 and returned in torch.float32"),
    (bnb.to_bnbq, dispatched(bnb.nn.LinearNF4(64, 4).to("cpu")), "1: LinearNF4 with a forward of its own .a hook of Accelerate"),
    (bnb.to_bnbq, Doubled(64, 4).to("cpu"), "1: Doubled with a forward of its own"),
    (bnb.from_bnbq, branched(nn.Linear4bit(64, 4)), "1: Linear4bitSideBranch with a forward of its own"),
    (bnb.from_bnbq, nn.Linear4bit(64, 4, quant_type="int4"), "1: bitsandbytes has no int4"),
    (bnb.from_bnbq, nn.Embedding4bit(4, 64, quant_type="int4"), "1: bitsandbytes has no int4"),
    (bnb.from_bnbq, nn.Linear8bitLt(64, 4, blocksize=32), "1: bitsandbytes has no int8 in blocks of 32"),
    (bnb.from_bnbq, nn.Embedding8bit(4, 64, blocksize=64), "1: bitsandbytes has no int8 in blocks of 64"),
    (bnb.from_bnbq, nn.Embedding4bit.from_embedding(Scaled(4, 64)), "1: Scaled4bit with a forward of its own"),
    (bnb.from_bnbq, with_buffer(nn.Embedding8bit(4, 64)), "1: Embedding8bit with scale, which"),
])
def test_layers_without_counterpart_are_named_and_nothing_changes(convert, layer, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert model[1] is layer


def test_a_shared_weight_is_decoded_in_one_dtype():
    embedding = nn.Embedding4bit(4, 64, weight_dtype=torch.bfloat16)
    head = nn.Linear4bit(64, 4, bias=False)
    head.tie_(embedding)
    with pytest.raises(ValueError, match="1: it decodes its weight in torch.float32, a layer .* torch.bfloat16"):
        bnb.from_bnbq(torch.nn.Sequential(embedding, head))
