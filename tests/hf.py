"""What the tests of Transformers models share: load, look at and compare them."""

import torch
import transformers
from safetensors.torch import load_file

import bnbq
from bnbq import nn

AUTO = transformers.AutoModelForCausalLM
IDS = torch.arange(1, 11)[None]
QUANTIZED = (nn.Linear4bit, nn.Linear8bitLt)
SPLIT = {  # a device map for small_models.llama
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def quantized(path, settings, **kwargs):
    return AUTO.from_pretrained(path, quantization_config=bnbq.BnbqConfig(**settings), **kwargs)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def assert_same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def file_tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def compared(monkeypatch):
    """How many tensors each load compared with their checksums."""
    counts = []
    verify = bnbq.checkpoint.verify_checksums
    monkeypatch.setattr(bnbq.checkpoint, "verify_checksums", lambda *a: counts.append(verify(*a)))
    return counts
