"""The linear layers that are compared: bnbq's, torch's own, bitsandbytes'.

Each builder takes a float32 weight [n, k], the dtype of the activations and whether gradients are wanted, and
returns a Contender of one layer, of which `build` makes copies. One that cannot be had raises, saying why.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from bnbq.nn import Linear4bit, Linear8bitLt

from .common import copies


@dataclass
class Contender:
    layers: list[nn.Module]
    nbytes: int  # that one call reads of its weight
    arithmetic: str  # the measured peak that bounds it: fp32, bf16 or int8
    dtype: torch.dtype  # of its activations

    def __call__(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return self.layers[i % len(self.layers)](x)


class Product(nn.Module):
    """An operator of torch that has no module."""

    def __init__(self, operator, *weight):
        super().__init__()
        self.operator, self.weight = operator, weight

    def forward(self, x):
        return self.operator(x, *self.weight)

    def __deepcopy__(self, memo):
        return Product(self.operator, *copy.deepcopy(self.weight, memo))


def linear(w: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def tensor_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.parameters())


def name_of(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def bnbq_nf4(w, dtype, training, double_quant=False):
    layer = Linear4bit.from_linear(linear(w), quant_type="nf4", double_quant=double_quant)
    return Contender([layer], tensor_bytes(layer), name_of(dtype), dtype)


def bnbq_nf4_dq(w, dtype, training):
    return bnbq_nf4(w, dtype, training, double_quant=True)


def bnbq_nf4_a8(w, dtype, training):
    """activations="int8"."""
    layer = Linear4bit.from_linear(linear(w), quant_type="nf4", activations="int8")
    return Contender([layer], tensor_bytes(layer), "int8", dtype)


def bnbq_int8(w, dtype, training):
    layer = Linear8bitLt.from_linear(linear(w))
    return Contender([layer], tensor_bytes(layer), name_of(dtype) if training else "int8", dtype)


def torch_bf16(w, dtype, training):
    if dtype != torch.bfloat16:
        raise NotImplementedError("only for bf16 activations")
    layer = linear(w.bfloat16())
    return Contender([layer], tensor_bytes(layer), "bf16", dtype)


def torch_fp32(w, dtype, training):
    """On float32 activations, whatever the others have."""
    layer = linear(w)
    return Contender([layer], tensor_bytes(layer), "fp32", torch.float32)


def torch_int4(w, dtype, training):
    """torch's weight-only int4: groups of 64 with a scale and a zero."""
    if training or dtype != torch.bfloat16:
        raise NotImplementedError("only for bf16 activations, and without gradients")
    groups = w.unflatten(1, (-1, 64))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-9)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).bfloat16().contiguous()
    layer = Product(torch.ops.aten._weight_int4pack_mm_for_cpu, packed, 64, scales)
    return Contender([layer], w.numel() // 2 + scales.nbytes, "bf16", dtype)


def torch_int8(w, dtype, training):
    """torch's weight-only int8."""
    if training or dtype != torch.bfloat16:
        raise NotImplementedError("only for bf16 activations, and without gradients")
    scales = w.abs().amax(1) / 127
    q, scales = (w / scales[:, None]).round().to(torch.int8), scales.bfloat16()
    return Contender([Product(torch.ops.aten._weight_int8pack_mm, q, scales)], q.nbytes, "bf16", dtype)


def torch_dynamic_int8(w, dtype, training):
    """oneDNN's int8 product with activations quantised per call, on float32; knows no outliers."""
    if training:
        raise NotImplementedError("without gradients")
    if torch.backends.quantized.engine != "onednn":
        torch.backends.quantized.engine = "onednn"
    layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear(w)), {nn.Linear}, torch.qint8)
    return Contender([layer], w.numel(), "int8", torch.float32)


def bitsandbytes_4bit(w, dtype, training, double_quant=False):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        w.shape[1],
        w.shape[0],
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=double_quant,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        w.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=double_quant, module=layer
    )
    layer = layer.to("cpu").train(training)
    if not training:  # it repacks its weight in the first such forward on a CPU: not timed
        layer(torch.zeros(1, w.shape[1], dtype=dtype))
    nbytes = w.numel() // 2 + w.numel() // 64 * (1 if double_quant else 4)
    return Contender([layer], nbytes, name_of(dtype), dtype)


def bitsandbytes_4bit_dq(w, dtype, training):
    return bitsandbytes_4bit(w, dtype, training, double_quant=True)


def bitsandbytes_8bit(w, dtype, training):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").train(training)
    layer(torch.zeros(1, w.shape[1], dtype=dtype))
    return Contender([layer], w.numel(), name_of(dtype) if training else "int8", dtype)


BUILDERS = {
    "bnbq nf4": bnbq_nf4,
    "bnbq nf4 a8": bnbq_nf4_a8,
    "bnbq int8": bnbq_int8,
    "torch bf16": torch_bf16,
    "torch fp32": torch_fp32,
    "torch int4": torch_int4,
    "torch int8": torch_int8,
    "torch dynamic int8": torch_dynamic_int8,
    "bitsandbytes nf4": bitsandbytes_4bit,
    "bitsandbytes int8": bitsandbytes_8bit,
}
TRAINING_BUILDERS = {
    "bnbq nf4": bnbq_nf4,
    "bnbq nf4 dq": bnbq_nf4_dq,
    "bnbq int8": bnbq_int8,
    "torch bf16": torch_bf16,
    "torch fp32": torch_fp32,
    "bitsandbytes nf4": bitsandbytes_4bit,
    "bitsandbytes nf4 dq": bitsandbytes_4bit_dq,
    "bitsandbytes int8": bitsandbytes_8bit,
}


def build(n: int, k: int, dtype: torch.dtype, only: list[str], training: bool = False) -> dict[str, Contender]:
    """The contenders whose names contain one of ``only``, on one random weight."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    built = {}
    for name, builder in (TRAINING_BUILDERS if training else BUILDERS).items():
        if any(part in name for part in only):
            try:
                with torch.no_grad():
                    contender = built[name] = builder(w, dtype, training)
                layer = contender.layers[0]
                contender.layers += [copy.deepcopy(layer) for _ in range(copies(contender.nbytes) - 1)]
            except (ImportError, NotImplementedError, AttributeError, RuntimeError) as error:
                print(f"{name} is not compared: {error}", flush=True)
    return built


def activations(m: int, k: int, outliers: str) -> torch.Tensor:
    """float32[m, k] with outliers for LLM.int8(), whose threshold is 6.

    "6": in six columns; "1%", "40%": in that share of the columns; "first-token": in three columns of the first of
    every 256 rows, and massive, as in the hidden states of a sequence's first token; "none".
    """
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x.clamp_(-5, 5)
    if outliers == "first-token":
        x[::256, torch.arange(3) * (k // 3)] = 500.0
    elif outliers != "none":
        count = int(outliers) if outliers.isdigit() else k * int(outliers.rstrip("%")) // 100
        columns = torch.arange(count) * k // max(count, 1)
        x[:, columns] += 20 * x[:, columns].sign()
    return x


OUTLIERS = ("none", "6", "1%", "40%", "first-token")
