"""Against bitsandbytes itself, on the CPU: the same bytes, and each reads the other's checkpoints bit for bit."""

import json
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare with")

from safetensors.torch import load_file  # noqa: E402

import bnbq  # noqa: E402
import cases  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn, ops, reference  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
functional = bitsandbytes.functional
KINDS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "int8": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    return small_models.llama(
        tmp_path_factory.mktemp("models") / "llama", hidden_size=128, num_attention_heads=8, num_key_value_heads=4
    )


def theirs(path, settings, **kwargs):
    return AUTO.from_pretrained(
        path, quantization_config=transformers.BitsAndBytesConfig(**settings), device_map={"": "cpu"}, **kwargs
    )


def their_layers(model):
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    }


def their_weight(layer):
    """What bitsandbytes decodes a layer to, by its plainest code: its AVX-512 kernel errs where blocks cross rows."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        state = layer.weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        packed = layer.weight.data.flatten().view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()].long()
        return (
            (state.code[codes] * absmax.float().repeat_interleave(state.blocksize)[: codes.numel()])
            .view(state.shape)
            .to(state.dtype)
        )
    weight = layer.weight
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB if weight.SCB is not None else layer.state.SCB)


# ------------------------------------------------------------------ quantising


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (5, 100), (3, 33), (1, 1)], ids=str)
def test_first_level_bytes(shape, quant_type, blocksize, dtype):
    weight = torch.from_numpy(cases.weight(*shape)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    ours = ops.quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize)
    assert torch.equal(ours.qweight.flatten(), packed.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax.flatten())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_awkward_blocks(quant_type):
    """Ties at every threshold, zeros of both signs, denormals, all-zero blocks."""
    blocks = torch.from_numpy(cases.awkward_blocks(64, reference.FORMATS[quant_type].thresholds))
    packed, state = functional.quantize_4bit(blocks, blocksize=64, quant_type=quant_type)
    ours = ops.quantize_4bit(blocks, quant_type=quant_type)
    assert torch.equal(ours.absmax.flatten(), state.absmax.flatten())
    assert torch.equal(ours.qweight.flatten(), packed.flatten())


@pytest.mark.parametrize("shape", [(64, 256), (5, 100), (1, 1)], ids=str)
def test_eight_bit_bytes_of_half_precision_weights(shape):
    weight = torch.from_numpy(cases.weight(*shape)).half()
    packed, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    ours = ops.quantize_8bit(weight)
    assert torch.equal(ours[1], absmax.float())
    assert torch.equal(ours[0], packed)


def test_double_quantised_scales_are_within_a_code_step():
    weight = torch.from_numpy(cases.weight(256, 512))
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    their_scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = ops.quantize_4bit(weight, double_quant=True)
    our_scales = ops.dequantize_absmax(ours.absmax, ours.absmax2, ours.absmax_offset)
    plain = ops.quantize_4bit(weight).absmax.flatten()
    step = ours.absmax2.max() * 0.0143  # the widest gap of the dynamic map
    assert (our_scales.flatten() - their_scales.flatten()).abs().max() <= step
    assert (our_scales.flatten() - plain).norm() <= (their_scales.flatten() - plain).norm() * 1.001


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", KINDS)
def test_their_checkpoints_load_here(llama, tmp_path, name):
    """Saved before any forward; then written back by us, and loaded by them once more."""
    model = theirs(llama, KINDS[name])
    model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = bnbq.from_pretrained(AUTO, tmp_path / "theirs")
    found = their_layers(model)
    assert (
        set(found) == {n for n, m in ours.named_modules() if isinstance(m, (nn.Linear4bit, nn.Linear8bitLt))}
        and len(found) == 14
    )
    for path, layer in found.items():
        mine = ours.get_submodule(path)
        wanted = their_weight(layer)
        assert torch.equal(mine.dequantize(wanted.dtype), wanted), path
        assert mine.weight_dtype == torch.bfloat16
        if "dq" in name:
            assert mine.double_quant and torch.equal(mine.absmax.flatten(), stored[f"{path}.weight.absmax"].flatten())
    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == stored.keys()
    for key, tensor in stored.items():
        if "quant_state" in key:
            assert json.loads(bytes(written[key].tolist())) == json.loads(bytes(tensor.tolist())), key
        else:
            assert written[key].dtype == tensor.dtype and torch.equal(written[key].flatten(), tensor.flatten()), key
    back = AUTO.from_pretrained(tmp_path / "ours", device_map={"": "cpu"})
    for path, layer in their_layers(back).items():
        assert torch.equal(their_weight(layer), their_weight(found[path])), path


@pytest.mark.parametrize("name", KINDS)
def test_our_checkpoints_load_there(llama, tmp_path, name):
    ours = AUTO.from_pretrained(
        llama, quantization_config=bnbq.BnbqConfig(**KINDS[name], checkpoint_format="bitsandbytes")
    )
    ours.save_pretrained(tmp_path)
    model = AUTO.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert model.quantization_method == "bitsandbytes"
    found = their_layers(model)
    assert len(found) == 14
    for path, layer in found.items():
        wanted = their_weight(layer)
        assert torch.equal(ours.get_submodule(path).dequantize(wanted.dtype), wanted), path
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        difference = (model(ids).logits - ours(ids).logits).float().norm() / ours(ids).logits.float().norm()
    assert difference < 0.05


@pytest.mark.parametrize(
    "settings",
    [dict(skip_modules=["down_proj"]), dict(include_modules=["lm_head"]), dict(skip_modules=["layers.0"])],
    ids=str,
)
def test_skips_mean_the_same_there(llama, tmp_path, settings):
    """bitsandbytes' skip list replaces its defaults, ours adds to them: the file must say it their way."""
    config = bnbq.BnbqConfig(bits=4, checkpoint_format="bitsandbytes", **settings)
    ours = AUTO.from_pretrained(llama, quantization_config=config)
    ours.save_pretrained(tmp_path)
    packed = {n for n, m in ours.named_modules() if isinstance(m, nn.Linear4bit)}
    model, info = AUTO.from_pretrained(tmp_path, device_map={"": "cpu"}, output_loading_info=True)
    assert set(their_layers(model)) == packed and not info["missing_keys"] and not info["unexpected_keys"]
    again = bnbq.from_pretrained(AUTO, tmp_path)
    assert {n for n, m in again.named_modules() if isinstance(m, nn.Linear4bit)} == packed


def test_their_skip_list_decides_for_their_checkpoints(llama, tmp_path):
    theirs(llama, dict(KINDS["nf4"], llm_int8_skip_modules=["down_proj"])).save_pretrained(
        tmp_path
    )  # quantises lm_head
    ours = bnbq.from_pretrained(AUTO, tmp_path)
    assert isinstance(ours.lm_head, nn.Linear4bit) and type(ours.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_other_storage_dtypes(llama, tmp_path, storage):
    model = theirs(llama, dict(KINDS["nf4"], bnb_4bit_quant_storage=storage))
    model.save_pretrained(tmp_path)
    ours = bnbq.from_pretrained(AUTO, tmp_path)
    for path, layer in their_layers(model).items():
        assert torch.equal(ours.get_submodule(path).dequantize(), their_weight(layer)), path


def test_gpt2(tmp_path):
    small_models.gpt2(tmp_path / "float")
    model = theirs(tmp_path / "float", KINDS["nf4"])
    model.save_pretrained(tmp_path / "theirs")
    ours = bnbq.from_pretrained(AUTO, tmp_path / "theirs")
    for path, layer in their_layers(model).items():
        assert torch.equal(ours.get_submodule(path).dequantize(), their_weight(layer)), path
    ours.save_pretrained(tmp_path / "ours")
    back = AUTO.from_pretrained(tmp_path / "ours", device_map={"": "cpu"})
    assert len(their_layers(back)) == 8
    for path, layer in their_layers(back).items():
        assert torch.equal(ours.get_submodule(path).dequantize(), their_weight(layer)), path


def test_file_written_after_a_forward(llama, tmp_path):
    """With AVX-512-BF16 bitsandbytes rewrites its scales in a forward and saves those; elsewhere the file is sound."""
    for name in ("nf4", "nf4-dq"):
        model = theirs(llama, KINDS[name]).eval()
        wanted = {path: their_weight(layer) for path, layer in their_layers(model).items()}
        with torch.no_grad():
            model(torch.arange(8)[None])
        model.save_pretrained(tmp_path / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = bnbq.from_pretrained(AUTO, tmp_path / name)
        assert len([w for w in caught if "bnbq" in str(w.message) or "bitsandbytes" in str(w.message)]) <= 1
        for path, weight in wanted.items():
            error = (ours.get_submodule(path).dequantize().float() - weight.float()).norm() / weight.float().norm()
            assert error < 0.02, (name, path)


def test_nothing_global_changes(llama, tmp_path):
    from transformers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    theirs(llama, KINDS["nf4"]).save_pretrained(tmp_path)
    bnbq.from_pretrained(AUTO, tmp_path)
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert their_layers(AUTO.from_pretrained(tmp_path, device_map={"": "cpu"}))
