"""Fine-tuning adapters with unmodified Trainer, TRL and Accelerate: checkpointing and streamed weights change nothing."""

import pytest

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
from adapters import (  # noqa: E402, F401
    AUTO,
    IDS,
    SETTINGS,
    assert_packed,
    base_model,
    logits,
    lora,
    packed,
)
from small_models import byte_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def text_like(rows=8):
    """Sequences with something to learn: few tokens, in an order that repeats."""
    ids = (torch.arange(rows)[:, None] + torch.arange(16)) % 4 * 7 + 100
    return [{"input_ids": row, "labels": row} for row in ids]


ARGUMENTS = dict(
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
)


def train(model, folder, **settings):
    """The losses of a few steps with Trainer."""
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **settings})
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=text_like())
    trainer.train()
    return losses(trainer)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_as_on_a_float_base(source, tmp_path):
    """With and without checkpointing: the loss falls as on the float base, and no packed byte changes."""
    fall = {}
    for name in ("float", "4bit-dq", "8bit"):
        model = base_model(source, name)
        if name == "4bit-dq":
            model = bnbq.prepare_model_for_kbit_training(model)
            assert model.is_activation_checkpointing
        before = packed(model)
        model = lora(model)
        values = train(model, tmp_path / name)
        assert_packed(model, before)
        assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
        fall[name] = values[0] - values[-1]
    assert fall["float"] > 1
    for name in ("4bit-dq", "8bit"):
        assert fall[name] > 0.8 * fall["float"], fall


def streamed(model, where, folder):
    """The model with Accelerate's hooks: weights come for each forward from the CPU or the disk, and go again."""
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if where == "disk":
        return accelerate.disk_offload(model, folder, execution_device=CPU)
    return model


@pytest.mark.parametrize("where", ["memory", "cpu", "disk"])
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["4bit-dq", "8bit"])
def test_checkpointing_and_streaming_change_no_gradient(source, tmp_path, name, use_reentrant, where):
    """Three steps of AdamW: the adapters end as those of a plain run in memory, bit for bit."""
    results = []
    for plain in (True, False):
        model = base_model(source, name)
        if not plain:
            model = streamed(model, where, tmp_path)
            if use_reentrant is not None:
                model = bnbq.prepare_model_for_kbit_training(
                    model, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
                )
        model = lora(model).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for row in text_like(3):
            model(row["input_ids"][None], labels=row["labels"][None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
        offloaded = [p.device.type == "meta" for n, p in model.named_parameters() if "qweight" in n]
        assert all(offloaded) if where != "memory" and not plain else not any(offloaded)
    expected, got = results
    assert expected.keys() == got.keys() and all(torch.equal(expected[n], got[n]) for n in expected)
    assert any(value.abs().max() > 1e-2 for n, value in got.items() if "lora_B" in n)


def test_adapters_that_cannot_start_without_the_weights(source):
    model = streamed(base_model(source, "4bit"), "cpu", None)
    for settings, text in (
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' reads weights"),
        (dict(use_dora=True), "use_dora reads weights"),
        (dict(modules_to_save=["lm_head"]), "lm_head is in modules_to_save and offloaded"),
    ):
        with pytest.raises(ValueError, match=text):
            lora(model, **settings)
    assert all(p.is_meta for p in model.parameters()) and torch.isfinite(logits(lora(model))).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trainer_with_checkpointing_and_layers_on_disk(source, tmp_path, use_reentrant):
    """from_pretrained with a device map, Trainer with its own switch for checkpointing; then saved and loaded."""
    config = bnbq.BnbqConfig(double_quant=True)
    device_map = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    device_map |= {"model.layers.0": "disk", "lm_head": "disk"}
    plain = train(lora(AUTO.from_pretrained(source, quantization_config=config)), tmp_path / "plain")
    model = AUTO.from_pretrained(
        source, quantization_config=config, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[0].mlp.up_proj.qweight.is_meta and not model.model.layers[1].mlp.up_proj.qweight.is_meta
    model = lora(model)
    values = train(
        model, tmp_path / "t", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert values == plain and values[0] - values[-1] > 1
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AUTO.from_pretrained(source, quantization_config=config), tmp_path / "adapter"
    )
    assert torch.equal(logits(again), expected)


def test_trainer_resumes(source, tmp_path):
    """A checkpoint of Trainer holds the adapter alone, and resuming ends where an uninterrupted run does."""
    whole = train(lora(base_model(source, "4bit")), tmp_path / "whole")
    train(lora(base_model(source, "4bit")), tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4)
    saved = tmp_path / "run" / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), **ARGUMENTS)
    trainer = transformers.Trainer(
        model=lora(base_model(source, "4bit")), args=arguments, train_dataset=text_like()
    )
    trainer.train(resume_from_checkpoint=str(saved))
    assert losses(trainer) == whole


@pytest.mark.parametrize("name", SETTINGS)
def test_sft_trainer(source, tmp_path, name):
    """TRL's SFTTrainer puts the adapter on itself; on a quantised base it learns what it learns on a float one."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (it brings datasets, pandas and pyarrow)")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in text_like()]})
    values = {}
    for kind in ("float", name):
        model = base_model(source, kind)
        before = packed(model)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path / kind), max_length=32, bf16=False, **ARGUMENTS),
            train_dataset=data,
            processing_class=byte_tokenizer(),
            peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        values[kind] = losses(trainer)
        assert_packed(trainer.model, before)
        assert isinstance(trainer.model, peft.PeftModel)
    assert values["float"][0] - values["float"][-1] > 1
    assert values[name][0] - values[name][-1] > 0.8 * (values["float"][0] - values["float"][-1]), values
