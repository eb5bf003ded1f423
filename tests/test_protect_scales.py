"""Scales held as int32, where others cast all float Parameters: DeepSpeed, FSDP2 in mixed precision."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from adapters import SETTINGS, assert_packed, base_model, logits, lora, make_source, packed, shake  # noqa: E402
from bnbq.packed import BITS  # noqa: E402
from hf import AUTO, assert_same  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("name", SETTINGS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory)


def are_protected(model):
    """Whether every scale is; they are all or none."""
    dtypes = {tensor.dtype for name, tensor in packed(model).items() if "absmax" in name} - {torch.uint8}
    assert len(dtypes) == 1
    return dtypes == {BITS}


def cast(model, but=()):
    """As DeepSpeed does; buffers stay."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in but:
            parameter.data = parameter.data.to(torch.bfloat16)


def test_a_cast_of_every_parameter_leaves_them(source, name):
    model = base_model(source, name)
    wanted = copy.deepcopy(model)
    cast(wanted, but=packed(wanted))
    assert bnbq.protect_scales(model) is model and are_protected(model)
    cast(model)
    assert torch.equal(logits(model), logits(wanted))
    bnbq.protect_scales(model, False)
    assert not are_protected(model)
    assert_packed(model, packed(wanted))


def test_files_do_not_show_it(source, name, tmp_path):
    model = base_model(source, name)
    wanted = copy.deepcopy(model)
    bnbq.protect_scales(model).save_pretrained(tmp_path / "bnbq")
    assert_same(wanted, AUTO.from_pretrained(tmp_path / "bnbq"))
    bnbq.save(model, tmp_path / "own")
    assert_same(wanted, bnbq.load(copy.deepcopy(wanted), tmp_path / "own"))


def test_state_dicts_of_both_kinds_load_into_both(source, name):
    plain, protected = base_model(source, name), bnbq.protect_scales(base_model(source, name))
    wanted = packed(plain)
    for one, other in ((plain, protected), (protected, plain), (protected, protected)):
        for assign in (False, True):
            target = copy.deepcopy(other)
            for tensor in target.parameters():
                tensor.data.zero_()
            target.load_state_dict(one.state_dict(), assign=assign)
            assert are_protected(target) == (other is protected)
            assert_packed(bnbq.protect_scales(target, False), wanted)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offloads_them_as_they_are(source, name, offload, tmp_path):
    """It casts what it takes from a state dict to the dtype of the Parameter."""
    model = bnbq.protect_scales(base_model(source, name))
    wanted = logits(model)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.qweight.is_meta
    assert torch.equal(logits(model), wanted)


def test_tied_layers_stay_tied(name, tmp_path):
    folder = small_models.llama(tmp_path / "tied", tie_word_embeddings=True)
    settings = bnbq.BnbqConfig(**SETTINGS[name], quantize_embeddings=True)
    model = bnbq.protect_scales(AUTO.from_pretrained(folder, quantization_config=settings))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert all(head._parameters[leaf] is embedding._parameters[leaf] for leaf in head.packed_spec())
    assert logits(model).isfinite().all()


def test_adapters_train_and_merge(source, name):
    models = [shake(lora(base_model(source, name))).train() for _ in range(2)]
    bnbq.protect_scales(models[1])
    for model in models:
        model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)
    merged = [bnbq.merge(model, force=True).model for model in models]
    assert are_protected(merged[1])
    assert_packed(bnbq.protect_scales(merged[1], False), packed(merged[0]))


PROCESSES = {
    "WORLD_SIZE": "2",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "True",
}


@pytest.mark.parametrize("variable", PROCESSES)
def test_it_is_done_where_a_model_may_be_sharded(source, name, variable, monkeypatch):
    settings = bnbq.BnbqConfig(**SETTINGS[name])
    monkeypatch.setenv(variable, "0")
    assert not are_protected(AUTO.from_pretrained(source, quantization_config=settings))
    monkeypatch.setenv(variable, PROCESSES[variable])
    assert are_protected(AUTO.from_pretrained(source, quantization_config=settings))
    model = AUTO.from_pretrained(source)
    bnbq.quantize_model(model, settings)
    assert are_protected(model)


def test_deepspeed_zero3_is_not_asked_to_build_a_quantised_model(source, name, monkeypatch):
    """What it would do to a float model is not done to ours: that is built whole, ready for deepspeed.initialize."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))  # imported, and empty
    zero3 = SimpleNamespace(is_zero3=lambda: True, config={"bf16": {"enabled": True}})
    monkeypatch.setattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    model = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(**SETTINGS[name]))
    assert are_protected(model)
    assert torch.equal(logits(model), logits(base_model(source, name)))


def test_offloaded_layers_are_refused(source, name, tmp_path):
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {part: "disk" if part == "model.layers.1" else "cpu" for part in parts}
    settings = bnbq.BnbqConfig(**SETTINGS[name])
    model = AUTO.from_pretrained(
        source, quantization_config=settings, device_map=device_map, offload_folder=str(tmp_path)
    )
    before = packed(model.model.layers[0])
    with pytest.raises(ValueError, match=r"model\.layers\.1.*is offloaded"):
        bnbq.protect_scales(model)
    assert_packed(model.model.layers[0], before)
