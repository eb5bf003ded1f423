"""The facade against bitsandbytes itself, on the CPU: the same signatures, schemas, bytes and state dicts."""

import copy
import inspect
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")

import bnbq.bitsandbytes as bnb  # noqa: E402
import cases  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = sorted(set(bnb.functional.__all__) - {"QuantState"})
OPERATORS = """
    quantize_4bit dequantize_4bit dequantize_4bit.out gemm_4bit gemv_4bit gemv_4bit.out quantize_blockwise
    dequantize_blockwise dequantize_blockwise.out int8_linear_matmul int8_linear_matmul.out int8_scaled_mm
    int8_mixed_scaled_mm int8_vectorwise_quant int8_vectorwise_dequant int8_mm_dequant int8_double_quant
""".split()

same_version = pytest.mark.skipif(
    bitsandbytes.__version__ != bnb.__version__,
    reason=f"bitsandbytes {bitsandbytes.__version__} is installed, the facade follows {bnb.__version__}",
)


def weight(*shape, dtype=torch.float32):
    return torch.from_numpy(cases.weight(*shape)).to(dtype)


def parameters(function):
    """Names, order and defaults; what kind of parameter, for those that take any."""
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


# ------------------------------------------------------------------ the surface


@same_version
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_same_arguments(name):
    assert parameters(getattr(bnb.functional, name)) == parameters(getattr(bitsandbytes.functional, name))


@same_version
@pytest.mark.parametrize("name", ["matmul", "matmul_4bit"])
def test_products_take_the_same_arguments(name):
    assert parameters(getattr(bnb, name)) == parameters(getattr(bitsandbytes, name))


@same_version
@pytest.mark.parametrize("name", bnb.nn.__all__)
def test_classes_take_the_same_arguments(name):
    ours, theirs = getattr(bnb.nn, name), getattr(bitsandbytes.nn, name)
    maker = "__new__" if issubclass(ours, torch.nn.Parameter) else "__init__"
    assert parameters(getattr(ours, maker)) == parameters(getattr(theirs, maker))


@same_version
def test_quant_state_and_matmul_state_have_their_fields():
    assert parameters(bnb.functional.QuantState.__init__) == parameters(bitsandbytes.functional.QuantState.__init__)
    ours, theirs = bnb.MatmulLtState(), bitsandbytes.MatmulLtState()
    for name in ("CB", "SCB", "SB", "subB", "idx", "threshold", "has_fp16_weights", "is_training", "use_pool"):
        assert getattr(ours, name) == getattr(theirs, name)


@same_version
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_same_schemas(name):
    name, _, overload = name.partition(".")
    ours, theirs = (
        getattr(getattr(getattr(torch.ops, space), name), overload or "default")._schema
        for space in ("bnbq_bitsandbytes", "bitsandbytes")
    )
    assert str(ours) == str(theirs).replace("bitsandbytes::", "bnbq_bitsandbytes::")


@same_version
def test_every_operator_but_the_optimizers_is_here():
    known = {op for op in torch._C._dispatch_get_all_op_names() if op.startswith("bitsandbytes::")}
    known = {op.removeprefix("bitsandbytes::") for op in known}
    assert {op for op in known if not op.startswith("optimizer_")} == set(OPERATORS)


# ------------------------------------------------------------------ functions


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("total_bits", range(2, 9))
def test_dynamic_maps(total_bits, signed):
    for exponent_bits in range(1, total_bits + 1) if signed else [total_bits - 1]:
        arguments = signed, exponent_bits, total_bits
        theirs = bitsandbytes.functional.create_dynamic_map(*arguments)
        assert torch.equal(bnb.functional.create_dynamic_map(*arguments), theirs)


def test_4bit_types():
    for name in ("nf4", "fp4"):
        theirs = bitsandbytes.functional.get_4bit_type(name, device="cpu")
        assert torch.equal(bnb.functional.get_4bit_type(name), theirs)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(16, 128), (7, 100), (4, 8, 64)], ids=str)
def test_quantize_4bit(shape, quant_type, dtype, storage):
    w = weight(shape[0], torch.Size(shape[1:]).numel(), dtype=dtype).view(shape)
    settings = dict(quant_type=quant_type, blocksize=64, quant_storage=storage)
    ours, our_state = bnb.functional.quantize_4bit(w, **settings)
    theirs, their_state = bitsandbytes.functional.quantize_4bit(w, **settings)
    assert ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    ours, theirs = our_state.as_dict(packed=True), their_state.as_dict(packed=True)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert bitsandbytes.functional.QuantState.from_dict(dict(ours), "cpu") == their_state
    assert bnb.functional.QuantState.from_dict(dict(theirs), "cpu") == our_state


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_double_quantisation_reads_theirs_and_writes_what_they_read():
    w = weight(64, 256, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = bnb.functional.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    decoded = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(bnb.functional.dequantize_4bit(packed, ours), decoded)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    theirs = bitsandbytes.functional.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    decoded = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(packed, theirs), decoded)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_blockwise_is_at_least_as_near(dtype):
    a = torch.randn(64, 512).to(dtype)
    ours, our_state = bnb.functional.quantize_blockwise(a, blocksize=256)
    theirs, their_state = bitsandbytes.functional.quantize_blockwise(a, blocksize=256)
    assert torch.equal(our_state.absmax, their_state.absmax) and torch.equal(our_state.code, their_state.code)
    code, absmax = our_state.code.double(), our_state.absmax.double().repeat_interleave(256)
    error = [(code[c.flatten().long()] * absmax - a.flatten().double()).abs() for c in (ours, theirs)]
    assert (error[0] <= error[1] + 1e-6 * absmax).all() and (ours == theirs).float().mean() > 0.98
    decoded = bitsandbytes.functional.dequantize_blockwise(ours, their_state)
    torch.testing.assert_close(bnb.functional.dequantize_blockwise(ours, our_state), decoded, rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_int8_rows(threshold):
    a = torch.randn(12, 64).half()
    for mine, theirs in zip(bnb.functional.int8_vectorwise_quant(a, threshold),
                            bitsandbytes.functional.int8_vectorwise_quant(a.clone(), threshold), strict=True):
        assert mine is theirs is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


def test_int8_products():
    a, b = torch.randn(12, 64).half(), torch.randn(8, 64).half()
    (qa, sa, _), (qb, sb, _) = bnb.functional.int8_vectorwise_quant(a), bnb.functional.int8_vectorwise_quant(b)
    sums = bnb.functional.int8_linear_matmul(qa, qb)
    assert torch.equal(sums, bitsandbytes.functional.int8_linear_matmul(qa, qb))
    theirs = bitsandbytes.functional.int8_mm_dequant(sums, sa, sb)
    torch.testing.assert_close(bnb.functional.int8_mm_dequant(sums, sa, sb), theirs, rtol=2e-3, atol=1e-3)
    dense = bitsandbytes.functional.int8_vectorwise_dequant(qa, sa)
    assert torch.equal(bnb.functional.int8_vectorwise_dequant(qa, sa), dense)


# ------------------------------------------------------------------ layers


def twins(name, dtype=torch.float32, bias=True, **settings):
    """A layer of ours and one of theirs, quantised from the same weight."""
    ours = getattr(bnb.nn, name)(128, 24, bias, **settings).to(dtype)
    theirs = getattr(bitsandbytes.nn, name)(128, 24, bias, **settings).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours.to("cpu"), theirs.to("cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name, settings", [
    ("Linear4bit", dict(compress_statistics=False)),
    ("LinearNF4", dict(compress_statistics=False, quant_storage=torch.bfloat16)),
    ("LinearFP4", dict(compress_statistics=False, bias=False)),
    ("Linear8bitLt", dict(has_fp16_weights=False)),
])  # fmt: skip
def test_state_dicts_are_the_same(name, settings, dtype):
    """int8 weights come from the values themselves here, from their fp16 rounding there: equal from half precision."""
    if name == "Linear8bitLt" and dtype == torch.float32:
        pytest.skip("their int8 bytes are those of the weight rounded to fp16")
    ours, theirs = twins(name, dtype, **settings)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape, key
        if key == "weight.quant_map":  # their fp4 codebook has a minus zero
            assert torch.equal(ours[key], theirs[key])
        else:
            assert raw(ours[key]) == raw(theirs[key]), key


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["LinearNF4", "LinearFP4"])
def test_4bit_state_dicts_go_there_and_back(name, double_quant, storage, dtype):
    settings = dict(compress_statistics=double_quant, quant_storage=storage)
    ours = getattr(bnb.nn, name)(128, 24, **settings).to(dtype).to("cpu")
    stored = ours.state_dict()
    statistics = {key: value.clone() for key, value in stored.items() if key.startswith("weight.")}
    theirs = getattr(bitsandbytes.nn, name)(128, 24, device="meta", **settings)
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(stored["weight"], statistics, device="cpu", module=theirs)
    theirs.bias = torch.nn.Parameter(stored["bias"])
    decoded = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(decoded, bnb.functional.dequantize_4bit(ours.weight.data, ours.quant_state))
    back = getattr(bnb.nn, name)(128, 24).to(dtype)
    back.load_state_dict(theirs.state_dict())
    again = back.state_dict()
    assert list(again) == list(stored)
    for key in stored:
        assert again[key].dtype == stored[key].dtype and raw(again[key]) == raw(stored[key]), key
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(back(x), ours(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_state_dicts_go_there_and_back(dtype):
    ours = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False).to(dtype).to("cpu")
    theirs = bitsandbytes.nn.Linear8bitLt(128, 24, has_fp16_weights=False).to(dtype).to("cpu")
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight.data, ours.weight.data) and torch.equal(theirs.weight.SCB, ours.weight.SCB)
    back = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False)
    back.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(back(x), ours(x))
    theirs.eval()(x)
    back.load_state_dict(theirs.state_dict())  # after their forward has moved the scales elsewhere
    assert torch.equal(back(x), ours(x))


@pytest.mark.parametrize("name, settings", [
    ("LinearNF4", {}), ("LinearFP4", {}), ("Linear8bitLt", dict(has_fp16_weights=False)),
    ("Linear8bitLt", dict(has_fp16_weights=False, threshold=2.5)), ("Linear8bitLt", {}),
])  # fmt: skip
def test_products_and_gradients_agree(name, settings):
    """Theirs in training mode, where no CPU has a path of its own; for int8 that is a float product."""
    ours, theirs = twins(name, torch.float16, **settings)
    x = torch.randn(16, 128, dtype=torch.float16)
    found = []
    for layer in (ours, theirs):
        xi = x.clone().requires_grad_()
        y = layer(xi)
        y.float().square().sum().backward()
        found.append((y.detach().float(), xi.grad.float()))
        if layer.weight.requires_grad:
            found[-1] += (layer.weight.grad.float(),)
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("name", ["Embedding4bit", "EmbeddingNF4", "EmbeddingFP4", "Embedding8bit"])
def test_embeddings_agree(name):
    ours, theirs = (getattr(module.nn, name)(20, 64) for module in (bnb, bitsandbytes))
    dense = {"weight": weight(20, 64).half().float()}
    for layer in (ours, theirs):
        layer.load_state_dict(dense)
        layer.to("cpu")
    index = torch.tensor([[1, 19], [0, 1]])
    torch.testing.assert_close(ours(index), theirs(index), rtol=3e-7, atol=0)


class ByOurNames(pickle.Unpickler):
    def find_class(self, module, name):
        return super().find_class(module.replace("bitsandbytes", "bnbq.bitsandbytes"), name)


@pytest.mark.parametrize("name, settings, blocksize", [
    ("LinearNF4", dict(compress_statistics=False), 64),
    ("LinearFP4", dict(quant_storage=torch.bfloat16), 128),
    ("Linear8bitLt", dict(has_fp16_weights=False, threshold=3.0), None),
])
def test_pickled_layers(name, settings, blocksize):
    """Whole layers, as torch.save(model) keeps them: theirs lose the class of the weight in it."""
    theirs = getattr(bitsandbytes.nn, name)(128, 24, **settings).half()
    theirs.weight.blocksize = blocksize
    theirs.to("cpu")
    layer = ByOurNames(io.BytesIO(pickle.dumps(theirs))).load()
    assert type(layer) is getattr(bnb.nn, name) and layer.is_packed
    ours = getattr(bnb.nn, name)(128, 24, **settings)
    ours.load_state_dict(theirs.state_dict())
    assert layer.state_dict().keys() == ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(raw(value) == raw(theirs.state_dict()[key]) for key, value in layer.state_dict().items())
    x = torch.randn(3, 128).half()
    for one in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), layer.to("cpu"), bnb.to_bnbq(layer)):
        assert torch.equal(one(x), ours.half()(x))
    if blocksize:
        assert ours.quant_state.blocksize == layer.quant_state.blocksize == blocksize
        assert pickle.loads(pickle.dumps(layer.quant_state)) == ours.quant_state
