"""The facade in bitsandbytes' place: unmodified Transformers, PEFT, Accelerate and diffusers, and calls that are found in
the code of others."""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import bnbq.bitsandbytes as bnb  # noqa: E402
import cases  # noqa: E402

TESTS = Path(__file__).parent
GUIDE = TESTS.parent / "docs" / "migrating.md"


# ------------------------------------------------------------------ libraries that import bitsandbytes themselves

# bitsandbytes may be installed where the tests run: as if it were not.
HIDE = """
import importlib.metadata
find = importlib.metadata.distribution
def hidden(name):
    if name == "bitsandbytes":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.distribution = hidden
"""


def in_its_place(check: str, installed: bool = False) -> None:
    """Run a function of this file in a process that has done what the guide says."""
    (recipe,) = re.findall(r"^```python\n((?:(?!```).)*?sys\.modules.*?)^```", GUIDE.read_text(), flags=re.S | re.M)
    code = f"{'' if installed else HIDE}\n{recipe}\nimport test_facade_downstream\ntest_facade_downstream.{check}"
    path = os.pathsep.join([str(TESTS), str(Path(bnb.__file__).parents[2])])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0, run.stderr[-4000:]


needs_guide = pytest.mark.skipif(not GUIDE.exists(), reason="no sources here (an installed package)")


@needs_guide
def test_imports_by_bitsandbytes_name():
    in_its_place("imports()")


def imports():
    import bitsandbytes.functional as functional
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.modules import Params4bit, QuantState
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from bitsandbytes.utils import pack_dict_to_tensor

    assert Linear4bit is bnb.nn.Linear4bit and Params4bit is bnb.nn.Params4bit
    assert QuantState is functional.QuantState is bnb.functional.QuantState
    assert replace_parameter_4bit is bnb.nn.parametrize.replace_parameter_4bit
    assert pack_dict_to_tensor is bnb.utils.pack_dict_to_tensor
    with pytest.raises(ImportError, match="8-bit and paged optimizers are outside bnbq"):
        from bitsandbytes.optim import AdamW8bit  # noqa: F401


@needs_guide
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transformers_and_peft(kind, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers", minversion="5.0")
    in_its_place(f"transformers_and_peft({kind!r}, {str(tmp_path)!r})")


def transformers_and_peft(kind, folder):
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import bnbq
    import small_models

    config = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[kind]
    small_models.llama(f"{folder}/float")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/float", quantization_config=config, device_map="cpu")
    layer, ids = model.model.layers[0].mlp.up_proj, torch.arange(10)[None]
    assert type(layer) is (bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt)
    with torch.no_grad():
        logits = model(ids).logits
        dense = model.dequantize(dtype=torch.float32)
        assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert (dense.float()(ids).logits - logits.float()).norm() < 0.03 * logits.float().norm()
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/float", quantization_config=config, device_map="cpu")
    model.save_pretrained(f"{folder}/saved", save_original_format=False)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", device_map="cpu")
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(bnbq.from_pretrained(AutoModelForCausalLM, f"{folder}/saved")(ids).logits, logits)
        assert torch.equal(bnb.to_bnbq(again)(ids).logits, logits)

    lora = peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora)
    wrapped = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(wrapped).__module__ == "peft.tuners.lora.bnb"
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    weight = wrapped.base_layer.weight
    before = (bnb.functional.dequantize_4bit(weight.data, weight.quant_state) if kind == "nf4"
              else bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB))
    wanted = before + wrapped.get_delta_weight("default").detach()
    model.merge_adapter()
    merged = wrapped.base_layer.weight
    if kind == "nf4":
        packed, state = bnb.functional.quantize_4bit(wanted, compress_statistics=True, quant_type="nf4")
        assert torch.equal(merged.data, packed) and merged.quant_state == state
    else:
        CB, SCB, _ = bnb.functional.int8_vectorwise_quant(wanted)
        assert torch.equal(merged.data, CB) and torch.equal(merged.SCB, SCB)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert plain.model.layers[0].mlp.up_proj is layer_of(plain) and plain(ids).logits.isfinite().all()


def layer_of(model):
    (layer,) = [module for name, module in model.named_modules() if name == "model.layers.0.mlp.up_proj"]
    assert type(layer) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return layer


@needs_guide
def test_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: diffusers asks for its version")
    in_its_place(f"diffusers_models({str(tmp_path)!r})", installed=True)


def diffusers_models(folder):
    """Its quantiser insists on a GPU, without need; the rest of it is as released."""
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    torch.manual_seed(0)
    model = SD3Transformer2DModel(attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
                                  pooled_projection_dim=32, num_layers=1, sample_size=8, in_channels=4,
                                  caption_projection_dim=64, out_channels=4, pos_embed_max_size=8)
    model.save_pretrained(f"{folder}/float")
    inputs = dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 6, 32),
                  pooled_projections=torch.randn(1, 32), timestep=torch.tensor([3]))
    for quantizer, config, kind in [
        ("BnB4BitDiffusersQuantizer", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), bnb.nn.Linear4bit),
        ("BnB8BitDiffusersQuantizer", BitsAndBytesConfig(load_in_8bit=True), bnb.nn.Linear8bitLt),
    ]:
        getattr(bnb_quantizer, quantizer).validate_environment = lambda *args, **kwargs: None
        load = dict(device_map="cpu", torch_dtype=torch.float32)
        quantized = SD3Transformer2DModel.from_pretrained(f"{folder}/float", quantization_config=config, **load)
        assert {type(m) for m in quantized.modules() if isinstance(m, torch.nn.Linear)} == {kind}
        quantized.save_pretrained(f"{folder}/{kind.__name__}")
        again = SD3Transformer2DModel.from_pretrained(f"{folder}/{kind.__name__}", **load)
        with torch.no_grad():
            wanted = model(**inputs).sample
            got = [m.eval()(**inputs).sample for m in (quantized, again)]
        assert torch.equal(*got) and (got[0] - wanted).norm() < 0.2 * wanted.norm()


# ------------------------------------------------------------------ hooks that move weights


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads_and_brings_back(where, tmp_path):
    """With bitsandbytes the bytes' scales are lost on meta."""
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(bnb.nn.LinearNF4(64, 64), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)).to("cpu")
    x = torch.randn(2, 64)
    y = model(x)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(model(x), y) and all(layer.weight.is_meta for layer in model)


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = bnb.nn.LinearNF4(64, 64, bias=False, quant_storage=torch.float32).to("cpu")
        self.a, self.b = torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def shard(rank, folder):
    """One of two processes: the older FSDP flattens packed bytes, stored as floats, with the floats that it trains, and
    shows each layer a view of them; the newer makes DTensors of them."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import CustomPolicy

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    torch.manual_seed(0)
    model = torch.nn.Sequential(Adapted(), Adapted())
    x = torch.randn(8, 64)
    wanted = model(x)
    stored = model.state_dict()
    each_linear = CustomPolicy(lambda module: isinstance(module, torch.nn.Linear))
    older = FullyShardedDataParallel(copy.deepcopy(model), auto_wrap_policy=each_linear, device_id=torch.device("cpu"))
    newer = copy.deepcopy(model)
    for layer in newer:
        fully_shard(layer)
    for sharded in (older, fully_shard(newer)):
        for _ in range(2):
            y = sharded(x)
            assert torch.equal(y, wanted)
        y.square().sum().backward()
    whole = older.state_dict()
    assert whole.keys() == stored.keys()  # bytes: as floats some are NaN, which equals nothing
    assert all(torch.equal(whole[key].view(torch.uint8), stored[key].view(torch.uint8)) for key in stored)
    distributed.destroy_process_group()


def test_fsdp_of_both_kinds(tmp_path):
    context = torch.multiprocessing.spawn(shard, (str(tmp_path),), nprocs=2, join=False)
    try:
        for _ in range(2):  # each join returns when one process has ended, and raises if it failed
            context.join(timeout=120)
        assert all(process.exitcode == 0 for process in context.processes)
    finally:
        for process in context.processes:
            process.kill()


# ------------------------------------------------------------------ experts


def test_a_mixture_with_adapters_on_its_experts():
    """What Transformers computes with experts' Parameters and what PEFT stacks on them go on, on 4-bit ones."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = dict(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=259)
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2)
    )
    dense, ids = copy.deepcopy(model), torch.arange(8)[None]
    experts, floats = (m.model.layers[0].mlp.experts for m in (model, dense))
    for name in ("gate_up_proj", "down_proj"):
        bnb.nn.parametrize.replace_parameter_4bit(experts, name)
        getattr(floats, name).data = getattr(experts, name)
    logits = model(ids).logits
    assert torch.equal(logits, dense(ids).logits) and model.get_memory_footprint() < 0.7 * dense.get_memory_footprint()
    target = dict(target_modules=[], target_parameters=["model.layers.0.mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **target))
    adapted = model(ids, labels=ids)
    assert not torch.equal(adapted.logits, logits)
    adapted.loss.backward()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


# ------------------------------------------------------------------ calls found in the code of others


def test_pieces_of_a_quant_state():
    """Kernels of others take a state apart, fill a buffer, and pass addresses on."""
    layer = bnb.nn.Linear4bit(64, 24, False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(24, 64).bfloat16(), requires_grad=False, quant_type="nf4")
    weight = layer.to("cpu").weight
    state = weight.quant_state
    nested = bnb.functional.QuantState(state.state2.absmax, code=state.state2.code, blocksize=256, dtype=torch.float32)
    absmax = bnb.functional.dequantize_blockwise(state.absmax, nested) + state.offset
    buffer = torch.empty(state.shape, dtype=state.dtype)
    assert bnb.functional.dequantize_4bit(weight.data, state, out=buffer) is buffer
    plain = bnb.functional.QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, plain), buffer)
    assert torch.equal(bnb.functional.dequantize_4bit(weight.t(), state), buffer.t())
    assert bnb.functional.get_ptr(weight).value == weight.data_ptr() and bnb.functional.get_ptr(None) is None
    assert layer.compute_type_is_set


def test_layers_sent_in_pieces():
    """Streaming loaders save a layer's tensor with its state under names of their own."""
    w = cases_weight(64, 128)
    packed, state = bnb.functional.quantize_nf4(w, blocksize=64)
    stored = {f"w.4bit.{key}": value for key, value in state.as_dict(packed=True).items()}
    read = {key.removeprefix("w.4bit."): value for key, value in stored.items()}
    back = bnb.functional.QuantState.from_dict(qs_dict=read, device="cpu")
    assert torch.equal(bnb.functional.dequantize_nf4(packed, back), bnb.functional.dequantize_nf4(packed, state))
    codes, state = bnb.functional.quantize_blockwise(w, blocksize=2048)
    back = bnb.functional.QuantState(absmax=state.absmax, code=state.code, blocksize=2048, dtype=torch.float16)
    decoded = bnb.functional.dequantize_blockwise(codes, back)
    assert decoded.dtype == torch.float16 and (decoded - w).abs().max() < 0.02 * w.abs().max()


def cases_weight(*shape):
    return torch.from_numpy(cases.weight(*shape))


def test_layers_of_others_around_matmul():
    """Servers keep CB and SCB in a MatmulLtState of their own and set attributes that versions ago had a meaning."""
    w, x = cases_weight(24, 64), torch.randn(3, 64)
    weight = bnb.nn.Int8Params(w, has_fp16_weights=False, requires_grad=False).to("cpu")
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.memory_efficient_backward, state.use_pool = 6.0, False, False, True
    state.CB, state.SCB = weight.CB, weight.SCB
    weight.CB = weight.SCB = None
    y = bnb.matmul(x, weight, bias=torch.ones(24), state=state)
    assert (y - (x @ w.t() + 1)).norm() < 0.01 * y.norm()
    assert state.CxB is state.CxBt is state.formatB is state._tile_indices is None


def test_a_forward_of_others_repairs_a_lost_state():
    layer, x = bnb.nn.LinearNF4(64, 24).to("cpu"), torch.randn(3, 64)
    y, state = layer(x), layer.quant_state
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    assert type(layer.weight) is bnb.nn.Params4bit and layer.weight.module is layer
    assert torch.equal(bnb.matmul_4bit(x, layer.weight.t(), bias=layer.bias, quant_state=layer.weight.quant_state), y)
    assert layer.weight.quant_state is state
    with pytest.raises(RuntimeError, match="not quantised yet"):
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(bnb.nn.LinearNF4(64, 24))


def test_settings_as_tensors():
    """A from_dict in place of ours reads the state of ours."""
    state = bnb.functional.quantize_4bit(cases_weight(8, 64), quant_type="nf4", compress_statistics=True)[1]
    stored = state.as_dict(packed=True)
    (key,) = [key for key in stored if key.split(".")[-1] in bnb.functional.QuantState.valid_qs_type_keys]
    settings = bnb.utils.unpack_tensor_to_dict(stored.pop(key))
    assert settings["blocksize"] == 64 and torch.equal(bnb.utils.pack_dict_to_tensor(settings), state.bitsandbytes__nf4)
    assert {*settings, *stored} <= set(bnb.functional.QuantState.valid_qs_keys)


def test_assigned_state_dicts_are_not_copied():
    stored = bnb.nn.LinearNF4(64, 8).to("cpu").state_dict()
    for device in ("cpu", "meta"):
        layer = bnb.nn.LinearNF4(64, 8, device=device)
        layer.load_state_dict(stored, assign=True)
        assert layer.weight.data_ptr() == stored["weight"].data_ptr()
        assert layer.quant_state.state2.absmax.data_ptr() == stored["weight.nested_absmax"].data_ptr()
    layer.load_state_dict(dict(stored))  # torch has noted in the other that it is to be assigned
    assert layer.weight.data_ptr() != stored["weight"].data_ptr()


def test_whole_models_are_saved(tmp_path):
    model = torch.nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), bnb.nn.LinearNF4(64, 8))
    model = model.half().to("cpu").bfloat16().to(device="cpu", dtype=torch.float32).to(torch.ones(1)).cpu()
    x, buffer = torch.randn(2, 64), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), x), model(x))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = torch.nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), bnb.nn.LinearNF4(64, 8))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))
