"""What the tests of PEFT share: a small model in every format, adapters on it that matter, and its float twin."""

import copy

import peft
import torch
import transformers

import bnbq
import small_models
from bnbq import nn
from bnbq.checkpoint import PACKED_NAMES

AUTO = transformers.AutoModelForCausalLM
SETTINGS = {"4bit": dict(bits=4), "4bit-dq": dict(bits=4, double_quant=True), "8bit": dict(bits=8)}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 17)[None]
LAYERS = (nn.Linear4bit, nn.Linear8bitLt)

loaded = {}


def make_source(factory):
    """The directory of the float model; ``factory`` is tmp_path_factory."""
    transformers.utils.logging.disable_progress_bar()
    return small_models.llama(factory.mktemp("models") / "llama", dtype=torch.float32, initializer_range=0.1)


def base_model(source, name):
    """A fresh copy of the model in this format; "float" is not quantised."""
    if (source, name) not in loaded:
        settings = SETTINGS.get(name)
        loaded[source, name] = AUTO.from_pretrained(
            source, quantization_config=bnbq.BnbqConfig(**settings) if settings else None
        )
    return copy.deepcopy(loaded[source, name])


def packed(model):
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if name.rpartition(".")[2] in PACKED_NAMES
    }


def assert_packed(model, before):
    """The packed tensors, by names with or without PEFT's, are those that were."""
    after = {name.replace(".base_layer.", "."): value for name, value in packed(model).items()}
    for name, value in before.items():
        match = next(key for key in after if key.endswith(name.replace(".base_layer.", ".")))
        assert torch.equal(after[match], value), name


def lora(model, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    return bnbq.get_peft_model(model, peft.LoraConfig(**settings))


def shake(model, seed=1, size=0.05):
    """Give the adapters an effect, large enough to outlive rounding to 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def float_layer(layer):
    """nn.Linear with the dequantised weight."""
    twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    if layer.bias is not None:
        twin.bias = layer.bias
    return twin


def float_twin(model):
    """A copy of the model with dequantised layers."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, LAYERS):
            twin.set_submodule(path, float_layer(module))
    return twin


def quantized_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
