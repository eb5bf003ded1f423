"""What each kind of layer can do, tried out on tiny models; docs/support.md is the table of the outcome.

    python tests/test_support.py --write    after a change of what is supported

A check passes, or the library says with an exception of its own what it does not do: then the table says no. Anything
else is a failure, and so is a table that differs from the committed one.
"""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft")

import bnbq  # noqa: E402
import small_models  # noqa: E402
from bnbq import nn  # noqa: E402
from bnbq.convert import convert_checkpoint  # noqa: E402
from bnbq.errors import UserError  # noqa: E402
from bnbq.experts import Experts4bit, Experts8bit  # noqa: E402
from bnbq.stream import quantize_checkpoint  # noqa: E402
from hf import AUTO, IDS, assert_same, logits  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


class No(Exception):
    """It runs, but not with layers of this kind."""


REFUSALS = (No, UserError, ValueError, TypeError, NotImplementedError)


class Subject(NamedTuple):
    """A model of one kind of layer: how it is quantised, the class that must be in it, and the model's dtype."""

    folder: Path
    settings: dict
    kind: type
    dtype: torch.dtype

    @property
    def config(self) -> bnbq.BnbqConfig:
        return bnbq.BnbqConfig(**self.settings)

    def load(self, **kwargs):
        kwargs = {"quantization_config": self.config, **kwargs}
        return self.found(self.load_float(**kwargs))

    def load_float(self, **kwargs):
        return AUTO.from_pretrained(self.folder, dtype=self.dtype, **kwargs).eval()

    def found(self, model):
        if not any(isinstance(module, self.kind) for module in model.modules()):
            raise No(f"there is no {self.kind.__name__} in it")
        return model


KINDS = {
    "Linear4bit, nf4": ("llama", {"bits": 4}, nn.Linear4bit),
    "Linear4bit, nf4, double quantisation": ("llama", {"bits": 4, "double_quant": True}, nn.Linear4bit),
    "Linear4bit, fp4": ("llama", {"bits": 4, "quant_type": "fp4"}, nn.Linear4bit),
    "Linear4bit, int4": ("llama", {"bits": 4, "quant_type": "int4"}, nn.Linear4bit),
    "Linear8bitLt": ("llama", {"bits": 8}, nn.Linear8bitLt),
    "Linear8bitLt in blocks": ("llama", {"bits": 8, "blocksize": 32}, nn.Linear8bitLt),
    "Embedding4bit": ("tied", {"bits": 4, "quantize_embeddings": True}, nn.Embedding4bit),
    "Embedding8bit": ("tied", {"bits": 8, "quantize_embeddings": True}, nn.Embedding8bit),
    "Experts4bit": ("mixture", {"bits": 4}, Experts4bit),
    "Experts8bit": ("mixture", {"bits": 8}, Experts8bit),
}


# ------------------------------------------------------------------ features


def forward(subject, folder):
    y = logits(subject.load())
    assert y.dtype == subject.dtype
    assert y.isfinite().all()


def gradients(subject, folder):
    model = subject.load()
    x = torch.randn(1, 5, model.config.hidden_size, dtype=subject.dtype, requires_grad=True)
    model(inputs_embeds=x).logits.square().sum().backward()
    assert x.grad.abs().sum() > 0


def save_and_load(subject, folder):
    model = subject.load()
    model.save_pretrained(folder / "saved")
    assert_same(model, AUTO.from_pretrained(folder / "saved"))


def in_bitsandbytes_format(subject, folder):
    model = subject.load(quantization_config=bnbq.BnbqConfig(**subject.settings, checkpoint_format="bitsandbytes"))
    model.save_pretrained(folder / "bnb")
    again = subject.found(bnbq.from_pretrained(AUTO, folder / "bnb"))
    assert torch.equal(logits(again), logits(model))


def streamed(subject, folder):
    quantize_checkpoint(subject.folder, folder / "streamed", subject.config, progress=False)
    again = subject.found(AUTO.from_pretrained(folder / "streamed"))
    for one, other in zip(subject.load().parameters(), again.parameters(), strict=True):
        assert one.dtype != torch.uint8 or torch.equal(one, other)


def to_bf16(subject, folder):
    subject.load().save_pretrained(folder / "packed")
    convert_checkpoint(folder / "packed", folder / "dense", "bf16", progress=False)
    dense = AUTO.from_pretrained(folder / "dense")
    assert not any(isinstance(module, subject.kind) for module in dense.modules())


def in_place(subject, folder):
    model = subject.load_float()
    bnbq.quantize_model(model, subject.config)
    assert torch.equal(logits(subject.found(model)), logits(subject.load()))


def copies(subject, folder):
    model = subject.load()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def on_disk(subject, folder):
    whole = logits(subject.load())
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    far = {"model.embed_tokens", "lm_head"} if issubclass(subject.kind, torch.nn.Embedding) else {"model.layers.1"}
    device_map = {part: "disk" if part in far else "cpu" for part in parts}
    model = subject.load(device_map=device_map, offload_folder=str(folder / "offload"))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), whole)


def lora(subject, folder):
    model = bnbq.prepare_model_for_kbit_training(subject.load())
    adapted = adapter_on(subject, model)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = logits(adapted)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained)
    optimizer.step()
    assert not torch.equal(logits(adapted), before)
    return adapted


def adapter_on(subject, model):
    if subject.kind in (Experts4bit, Experts8bit):
        config = peft.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        return peft.get_peft_model(model, bnbq.lora_config(model, config))
    embeds = issubclass(subject.kind, torch.nn.Embedding)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens"] if embeds else "all-linear"))


def merge(subject, folder):
    merged = lora(subject, folder).merge_and_unload()
    assert logits(subject.found(merged)).isfinite().all()


def compiled(subject, folder):
    model = subject.load()
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend="eager", fullgraph=True)(IDS).logits
    assert torch.equal(y, logits(model))


def cast_by_others(subject, folder):
    """What DeepSpeed does to the Parameters of a model under bf16 or fp16."""
    model = bnbq.protect_scales(subject.load())
    whole = logits(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(subject.dtype)
    assert torch.equal(logits(model), whole)


FEATURES = {
    "forward": forward,
    "gradient of the input": gradients,
    "`quantize_model`": in_place,
    "save, load": save_and_load,
    "bitsandbytes' format": in_bitsandbytes_format,
    "`bnbq quantize`": streamed,
    "`bnbq convert` to bf16": to_bf16,
    "deepcopy": copies,
    "`device_map` with cpu, disk": on_disk,
    "LoRA": lora,
    "LoRA merged": merge,
    "`torch.compile`, one graph": compiled,
    "scales kept from casts": cast_by_others,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------ the table


def folder_of(model: str, dtype: torch.dtype, root: Path) -> Path:
    """A tiny model in a directory of its own."""
    make = small_models.mixture if model == "mixture" else small_models.llama
    return make(root / "model", dtype=dtype, **({"tie_word_embeddings": True} if model == "tied" else {}))


def works(check, subject: Subject, folder: Path) -> bool:
    torch.manual_seed(0)
    folder.mkdir()
    try:
        check(subject, folder)
    except REFUSALS:
        return False
    return True


def row(name: str, root: Path) -> str:
    """Of the table: for each feature "yes", "no", or the dtypes that it takes."""
    model, settings, kind = KINDS[name]
    fine = {title: [] for title in FEATURES}
    for short, dtype in DTYPES.items():
        subject = Subject(folder_of(model, dtype, root / short), settings, kind, dtype)
        for i, (title, check) in enumerate(FEATURES.items()):
            if works(check, subject, root / short / str(i)):
                fine[title].append(short)
    cells = ["yes" if len(dtypes) == len(DTYPES) else ", ".join(dtypes) or "no" for dtypes in fine.values()]
    return f"| {' | '.join([name, *cells])} |"


def page(rows: list[str]) -> str:
    head = "\n".join(f"| {' | '.join(cells)} |" for cells in (["", *FEATURES], ["---"] * (len(FEATURES) + 1)))
    table = "\n".join([head, *rows])
    return f"""# What is supported

Written by `python tests/test_support.py --write` from what tiny models did on a CPU in fp32, bf16 and fp16, with unmodified
Transformers, PEFT and Accelerate; the tests hold it to that. "yes" is all three, "no" an exception that says so. Embeddings
are tied to an output head here. What is known of GPUs is in the [README](../README.md#gpus).

{table}
"""


@pytest.mark.parametrize("name", KINDS)
def test_the_page_says_what_is_so(name, tmp_path):
    transformers.utils.logging.disable_progress_bar()
    assert row(name, tmp_path) in PAGE.read_text().splitlines()


def test_the_page_is_whole():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in rows] == [f"| {name}" for name in KINDS]
    assert PAGE.read_text() == page(rows)


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        PAGE.write_text(page([row(name, Path(root, str(i))) for i, name in enumerate(KINDS)]))
