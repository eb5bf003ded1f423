"""Unmodified PEFT on quantised bases: adapters train, save and load; merging equals quantising the dense merge."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn  # noqa: E402
from bnbq.report import count_parameters, print_trainable_parameters  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
SETTINGS = {"4bit": dict(bits=4), "4bit-dq": dict(bits=4, double_quant=True), "8bit": dict(bits=8)}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 17)[None]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32, initializer_range=0.1)


loaded = {}


def base_model(source, name):
    """A fresh copy of the model in this format."""
    if (source, name) not in loaded:
        settings = SETTINGS.get(name)
        loaded[source, name] = AUTO.from_pretrained(
            source, quantization_config=bnbq.BnbqConfig(**settings) if settings else None
        )
    return copy.deepcopy(loaded[source, name])


def packed(model):
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if name.split(".")[-1] in ("qweight", "absmax", "absmax2", "absmax_offset")
    }


def lora(model, seed=0, **settings):
    torch.manual_seed(seed)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    )


def shake(model, seed=1):
    """Give the adapters an effect, large enough to outlive rounding to 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def text_like(rows=8):
    """Sequences with something to learn: few tokens, in an order that repeats."""
    ids = (torch.arange(rows)[:, None] + torch.arange(16)) % 4 * 7 + 100
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=text_like())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_lora_trains_as_on_a_float_base(source, tmp_path):
    """Trainer, with and without checkpointing: the loss falls as on the float base, and no packed byte changes."""
    losses = {}
    for name in ("float", "4bit-dq", "8bit"):
        model = base_model(source, name)
        if name == "4bit-dq":
            model = bnbq.prepare_model_for_kbit_training(model)
            assert model.is_activation_checkpointing
        before = packed(model)
        model = lora(model)
        losses[name] = train(model, tmp_path / name)
        after = packed(model)
        for key, value in before.items():
            match = next(other for other in after if other.replace(".base_layer.", ".").endswith(key))
            assert torch.equal(after[match], value), key
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    fall = {name: values[0] - values[-1] for name, values in losses.items()}
    assert fall["float"] > 1
    for name in ("4bit-dq", "8bit"):
        assert fall[name] > 0.8 * fall["float"], losses


def float_twin(layer):
    """nn.Linear with the dequantised weight."""
    twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    twin.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    return twin


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_those_through_the_dequantised_weight(source, name):
    model = lora(base_model(source, name))
    shake(model)
    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        if isinstance(module, (nn.Linear4bit, nn.Linear8bitLt)):
            dense.set_submodule(path, float_twin(module))
    for twin in (model, dense):
        twin(IDS, labels=IDS).loss.backward()
    wanted = dict(dense.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            error = (parameter.grad - wanted[path].grad).norm() / wanted[path].grad.norm()
            assert error < (0.05 if name == "8bit" else 1e-3), (path, error)


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_save_and_load(source, tmp_path, name):
    model = lora(base_model(source, name))
    shake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("qweight" in key for key in peft.utils.load_peft_weights(tmp_path, device="cpu"))
    again = peft.PeftModel.from_pretrained(base_model(source, name), tmp_path)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base_model(source, name)))
    base = base_model(source, name)
    base.load_adapter(tmp_path)  # Transformers' own door to PEFT
    assert torch.equal(logits(base), expected)


def delta(layer):
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("name", SETTINGS)
def test_merge_equals_quantising_the_dense_merge(source, tmp_path, name, safe):
    model = lora(base_model(source, name))
    shake(model)
    wanted = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            base = module.base_layer
            dense = base.dequantize() + delta(module).detach()
            wanted[path] = {n: t.clone() for n, t in copy.deepcopy(base).quantize_(dense).named_parameters()}
    unmerged, before = logits(model), packed(model)
    model.merge_adapter(safe_merge=safe)
    for path, tensors in wanted.items():
        for leaf, tensor in tensors.items():
            assert torch.equal(model.get_submodule(path).base_layer.get_parameter(leaf), tensor), (path, leaf)
    assert any(not torch.equal(before[key], value) for key, value in packed(model).items())
    merged = logits(model)
    assert (merged - unmerged).norm() / unmerged.norm() < (0.06 if name == "8bit" else 0.4)
    model.unmerge_adapter()
    assert (logits(model) - unmerged).norm() / unmerged.norm() < (0.08 if name == "8bit" else 0.5)

    fresh = lora(base_model(source, name))
    shake(fresh)
    plain = fresh.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(plain), merged) and not any(hasattr(m, "lora_A") for m in plain.modules())
    plain.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "merged")), merged)


def test_a_merge_that_is_not_finite_is_refused(source):
    model = lora(base_model(source, "4bit"))
    shake(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    before = packed(model)
    for safe in (True, False):
        with pytest.raises(ValueError):
            model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(before[key], value) for key, value in packed(model).items())


def dora_like():
    return {
        "dora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
        "rslora": peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], use_rslora=True, init_lora_weights=False
        ),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        "adalora": peft.AdaLoraConfig(
            target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, init_lora_weights=False
        ),
        "loha": peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
        "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj"], init_weights=False),
        "oft": peft.OFTConfig(
            target_modules=["q_proj"], oft_block_size=16, use_cayley_neumann=False, init_weights=False
        ),
        "boft": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=16, init_weights=False),
        "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
        "hra": peft.HRAConfig(r=4, target_modules=["q_proj"], init_weights=False),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", list(dora_like()))
def test_other_tuners_forward_backward_and_merge(source, kind, bits):
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(source, f"{bits}bit"), dora_like()[kind])
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    if kind == "adalora":
        model.base_model.peft_config["default"].total_step = None
    model.eval()
    twin, before = copy.deepcopy(model), packed(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, (nn.Linear4bit, nn.Linear8bitLt)):
            twin.set_submodule(path, float_twin(module))
    merged, dense = model.merge_and_unload(), twin.merge_and_unload()
    changed = different = total = 0
    for path, module in merged.named_modules():
        if isinstance(module, (nn.Linear4bit, nn.Linear8bitLt)):
            wanted = copy.deepcopy(module).quantize_(dense.get_submodule(path).weight).qweight
            old = next(
                value for key, value in before.items() if key.replace(".base_layer.", ".").endswith(f"{path}.qweight")
            )
            changed += (old != module.qweight).sum().item()
            different += (wanted != module.qweight).sum().item()
            total += wanted.numel()
    assert changed > 0 and different <= total * 1e-4, (changed, different, total)


@pytest.mark.parametrize("prepare", ["theirs", "ours"])
def test_prepare(source, prepare):
    model = AUTO.from_pretrained(source, quantization_config=bnbq.BnbqConfig(), dtype=torch.bfloat16)
    before = packed(model)
    if prepare == "theirs":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        assert model.model.norm.weight.dtype == torch.float32
    else:
        assert (
            bnbq.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True}) is model
        )
        assert model.model.norm.weight.dtype == torch.bfloat16 and model.is_activation_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(before[key], value) and before[key].dtype == value.dtype for key, value in packed(model).items()
    )
    model = lora(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    plain = bnbq.prepare_model_for_kbit_training(base_model(source, "4bit"), use_gradient_checkpointing=False)
    assert not plain.is_activation_checkpointing


def test_parameters_are_counted_as_the_float_model_has_them(source, capsys):
    wanted = sum(p.numel() for p in base_model(source, "float").parameters())
    for name in SETTINGS:
        model = base_model(source, name)
        assert count_parameters(model) == wanted
    model = lora(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model, trainable=True) == trainable
    assert count_parameters(model) == wanted + trainable
    print_trainable_parameters(model)
    assert f"trainable params: {trainable:,d} || all params: {wanted + trainable:,d}" in capsys.readouterr().out


def test_seven_billion(capsys):
    """LoRA of rank 16 on all attention projections of Llama-7B: a fifth of a percent, whether 4-bit or float."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        bnbq.quantize_model(model, bnbq.BnbqConfig())
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )
    trainable, total = count_parameters(model, trainable=True), count_parameters(model)
    assert total - trainable == 6_738_415_616 and 0.001 < trainable / total < 0.005
