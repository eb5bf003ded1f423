"""bnbq.merge on layers that Accelerate keeps in memory or on disk between forwards: the bits of the resident merge,
written where they are kept."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import AlignDevicesHook  # noqa: E402

import bnbq  # noqa: E402
import moe_models  # noqa: E402
from adapters import (  # noqa: E402
    AUTO,
    SETTINGS,
    TARGETS,
    base_model,
    logits,
    lora,
    make_source,
    shake,
)
from bnbq.packed import PackedModule  # noqa: E402
from hf import assert_same  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SPLIT = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
HOW = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder / "disk", execution_device=CPU),
    "dispatched": lambda model, folder: accelerate.dispatch_model(model, SPLIT, offload_dir=folder / "disk"),
    "from_pretrained": lambda model, folder: reloaded(model, folder),
    "load_and_quantize": lambda model, folder: streamed(model, folder),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory)


def reloaded(model, folder):
    """From a packed checkpoint: its own files are the offloaded tensors'."""
    model.save_pretrained(folder / "packed")
    return AUTO.from_pretrained(folder / "packed", device_map=SPLIT, offload_folder=folder / "disk")


def streamed(model, folder):
    model.save_pretrained(folder / "packed")
    with accelerate.init_empty_weights():
        empty = AUTO.from_config(transformers.AutoConfig.from_pretrained(folder / "packed")).eval()
    return bnbq.load_and_quantize(
        empty, model.config.quantization_config, folder / "packed", device_map=SPLIT, offload_folder=folder / "disk"
    )


def placed(model):
    """Name -> device of every parameter."""
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_stored(model, wanted, folder):
    """Saved, or without the hooks: Transformers saves what it loaded or dispatched by a device_map."""
    if hasattr(model, "hf_device_map"):
        model.save_pretrained(folder)
        assert_same(AUTO.from_pretrained(folder), wanted)
    else:
        accelerate.hooks.remove_hook_from_submodules(model)
        assert_same(model, wanted)


def adapted(model, size=0.2, **settings):
    return shake(lora(model, **settings), size=size)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", HOW)
def test_equals_the_merge_in_memory(source, tmp_path, how, name):
    for keep in ("quantized", "side-branch"):
        folder = tmp_path / keep
        folder.mkdir()
        wanted = bnbq.merge(adapted(base_model(source, name)), keep, force=True)
        model = HOW[how](base_model(source, name), folder)
        before, files = placed(model), contents(folder / "packed")
        assert "meta" in before.values()
        merge = bnbq.merge(adapted(model), keep, force=True)
        assert merge.layers == wanted.layers and type(merge.model) is transformers.LlamaForCausalLM
        assert not hasattr(merge.model, "peft_config")
        for _ in range(2):
            assert torch.equal(logits(merge.model), logits(wanted.model))
        after = placed(merge.model)
        assert {n: device for n, device in after.items() if "side_branch" not in n} == before
        assert contents(folder / "packed") == files  # a checkpoint is never written to
        assert_stored(merge.model, wanted.model, folder / "saved")


@pytest.mark.parametrize("how", HOW)
def test_merging_onto_a_branch(source, tmp_path, how):
    """Whose own tensors are offloaded too."""
    first = bnbq.merge(adapted(base_model(source, "4bit"), size=0.01), "side-branch").model
    for keep in ("side-branch", "quantized"):
        folder = tmp_path / keep
        folder.mkdir()
        wanted = bnbq.merge(adapted(copy.deepcopy(first), seed=5), keep, force=True)
        model = HOW[how](copy.deepcopy(first), folder)
        assert model.model.layers[0].mlp.up_proj.side_branch.a.is_meta
        merge = bnbq.merge(adapted(model, seed=5), keep, force=True)
        assert merge.layers == wanted.layers
        assert torch.equal(logits(merge.model), logits(wanted.model))
        assert_stored(merge.model, wanted.model, folder / "saved")


@pytest.mark.parametrize("how", HOW)
def test_a_refusal_changes_nothing(source, tmp_path, how):
    model = adapted(HOW[how](base_model(source, "4bit"), tmp_path), size=0.002)
    expected, before, files = logits(model), placed(model), contents(tmp_path / "disk")
    with pytest.raises(bnbq.MergeRefused, match="nothing was changed: 8 of 8 layers"):
        bnbq.merge(model)
    with pytest.raises(ValueError, match="keep='bf16' casts the whole model, and .* is offloaded.*'side-branch'"):
        bnbq.merge(model, "bf16", force=True)
    assert torch.equal(logits(model), expected) and placed(model) == before and contents(tmp_path / "disk") == files
    assert torch.equal(logits(bnbq.merge(model, "side-branch").model), expected)


def test_a_bias_is_written_too(tmp_path):
    block = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
    bnbq.quantize_model(block, bnbq.BnbqConfig(blocksize=32))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True, init_lora_weights=False)
    x = torch.randn(3, 64)
    for keep in ("quantized", "side-branch"):
        for how in ("cpu_offload", "disk_offload"):
            torch.manual_seed(0)
            wanted = bnbq.merge(peft.get_peft_model(copy.deepcopy(block), config), keep, force=True).model
            torch.manual_seed(0)
            model = bnbq.get_peft_model(HOW[how](copy.deepcopy(block), tmp_path / keep), config)
            merged = bnbq.merge(model, keep, force=True).model
            with torch.no_grad():
                assert torch.equal(merged(x), wanted(x))


@pytest.mark.parametrize("layers", ["linear", "experts"])
@pytest.mark.parametrize("how", [None, "each"])
def test_scales_that_are_protected(source, tmp_path, layers, how):
    """Held as int32 of their bits (bnbq.protect_scales), in the module or where Accelerate keeps them."""
    found = []
    for protected in (False, True):
        torch.manual_seed(0)
        if layers == "linear":
            model, config = base_model(source, "4bit"), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        else:
            folder, _ = moe_models.build("gpt_oss", tmp_path / "float")
            model = AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig())
            config = bnbq.lora_config(model, peft.LoraConfig(r=4, target_modules=["experts"], init_lora_weights=False))
        if protected:
            bnbq.protect_scales(model)
            for module in model.modules() if how == "each" else ():
                if isinstance(module, PackedModule):
                    accelerate.hooks.add_hook_to_module(module, AlignDevicesHook(CPU, offload=True))
        merged = bnbq.merge(bnbq.get_peft_model(model, config), force=True)
        held = {p.dtype for name, p in merged.model.named_parameters() if name.endswith(".absmax")}
        assert held == {torch.int32 if protected else torch.float32}
        found.append((merged.layers, logits(merged.model)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("place", ["disk", "cpu_offload"])
@pytest.mark.parametrize("layout", moe_models.LAYOUTS)
def test_experts(tmp_path, layout, place):
    folder, _ = moe_models.build(layout, tmp_path / "float")
    AUTO.from_pretrained(folder, quantization_config=bnbq.BnbqConfig(double_quant=True)).save_pretrained(tmp_path / "packed")
    files = contents(tmp_path / "packed")

    def load(**settings):
        return AUTO.from_pretrained(tmp_path / "packed", **settings)

    def with_adapter(model):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["o_proj", "experts"], init_lora_weights=False)
        return bnbq.get_peft_model(model, bnbq.lora_config(model, config))

    wanted = bnbq.merge(with_adapter(load()), force=True)
    if place == "disk":
        model = load(device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "disk")
    else:
        model = accelerate.cpu_offload(load(), execution_device=CPU)
    merge = bnbq.merge(with_adapter(model), force=True)
    assert merge.layers == wanted.layers and any("experts" in row.name for row in merge.layers)
    assert all(packed.qweight.is_meta for packed in moe_models.packed_experts(merge.model).values())
    assert torch.equal(logits(merge.model), logits(wanted.model)) and contents(tmp_path / "packed") == files
    assert_stored(merge.model, wanted.model, tmp_path / "saved")


def test_what_cannot_be_merged(source, tmp_path):
    base_model(source, "4bit").save_pretrained(tmp_path / "packed")
    model = adapted(AUTO.from_pretrained(tmp_path / "packed", device_map=SPLIT))
    expected = logits(model)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj stays in the files of the checkpoint.*offload_folder"):
        bnbq.merge(model, force=True)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(bnbq.merge(model, "side-branch").model), expected)  # writes nothing there

    model = HOW["dispatched"](base_model(source, "4bit"), tmp_path)
    model = adapted(model, target_modules=[*TARGETS, "lm_head"])
    expected = logits(model)
    with pytest.raises(ValueError, match="lm_head is not quantised and offloaded"):
        bnbq.merge(model, force=True)
    assert torch.equal(logits(model), expected)

    model = accelerate.cpu_offload(base_model(source, "4bit"), execution_device=CPU)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS))  # which puts adapters on meta
    with pytest.raises(ValueError, match="q_proj.lora_A.default.weight of the adapter is on the meta device"):
        bnbq.merge(model, force=True)

    empty = base_model(source, "4bit").to("meta")
    model = peft.get_peft_model(empty, peft.LoraConfig(target_modules=TARGETS)).to_empty(device="meta")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_A.to_empty(device="cpu"), module.lora_B.to_empty(device="cpu")
            torch.nn.init.zeros_(module.lora_A["default"].weight), torch.nn.init.zeros_(module.lora_B["default"].weight)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj has no data"):
        bnbq.merge(model, force=True)


def test_a_shared_weight_is_left_alone(source, tmp_path):
    """An offloaded head that shares its bytes with the embedding has them twice where they are kept."""
    config = json.loads((source / "config.json").read_text())
    tied = AUTO.from_config(transformers.LlamaConfig(**{**config, "tie_word_embeddings": True}))
    bnbq.quantize_model(tied, bnbq.BnbqConfig(quantize_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    model = AUTO.from_pretrained(tmp_path / "tied", device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    model = adapted(model, target_modules=["lm_head"])
    expected = logits(model)
    with pytest.raises(ValueError, match="lm_head is offloaded and shares its weight"):
        bnbq.merge(model, force=True)
    assert torch.equal(logits(model), expected)
