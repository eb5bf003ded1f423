"""What is in a quantised model: formats, bytes, why the rest is float, and which kernels run.

All sizes are exact: everything a quantised layer keeps is an ordinary Parameter. Parameter counts are
logical, those of the float model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import nn as torch_nn

from . import _bnbq, nn, ops_library
from .experts import QuantizedExperts, expert_weights, float_part
from .packed import PackedModule
from .state import LIKE

# ------------------------------------------------------------------ sizes


def tensors_of(model: torch_nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Parameter and buffer once, by its first name."""
    seen = set()
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


def get_memory_footprint(model: torch_nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once; offloaded ones count too."""
    return sum(size_of(tensor) for _, tensor in tensors_of(model))


def count_parameters(model: torch_nn.Module, trainable: bool | None = None) -> int:
    """Parameters of the model as if it were float: a quantised weight counts its logical elements.

    Args:
        trainable: True counts only those that require a gradient, False only the others.
    """
    packed = {}  # the first of a layer's packed tensors stands for the weight, the others for nothing
    for module in model.modules():
        if isinstance(module, PackedModule):
            for i, name in enumerate(module.packed_spec()):
                packed[id(module._parameters[name])] = math.prod(module.weight_shape) if i == 0 else 0
            packed[id(module._parameters.get(LIKE))] = 0
    total = 0
    for parameter in model.parameters():
        # Scales may be made to require a gradient by accident; the quantised weight is frozen all the same.
        frozen = id(parameter) in packed or not parameter.requires_grad
        if trainable is None or trainable != frozen:
            total += packed.get(id(parameter), parameter.numel())
    return total


def print_trainable_parameters(model: torch_nn.Module) -> None:
    """Print one line: trainable and logical parameters, as PEFT does for float models."""
    trainable, total = count_parameters(model, trainable=True), count_parameters(model)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / max(total, 1):.4f}"
    )


# ------------------------------------------------------------------ the report


@dataclass
class Row:
    """One module that owns tensors. Tied tensors belong to the first that has them."""

    name: str
    kind: str  # class name
    format: str  # "nf4/64", "nf4/64+dq", "int8/row", "bfloat16"
    bits: float  # per logical parameter of the weight, scales included
    bytes: int  # of all its tensors
    parameters: int  # logical
    quantized: bool
    why: str  # for the others: why they are float
    kernel: str = ""
    bytes_as_float: int = 0  # what the tensors would take in the layer's float dtype
    linear: bool = False
    error: float | None = None  # |W - Wq| / |W|, Frobenius, with `against`


@dataclass
class Report:
    """Rows of a model; ``str(report)`` is a table, ``summary()`` one line, ``to_dict()`` is for JSON."""

    rows: list[Row] = field(default_factory=list)

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.quantized]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_as_float(self) -> int:
        return sum(row.bytes_as_float for row in self.rows)

    @property
    def fraction(self) -> float:
        """Part of the float model's bytes that is quantised now."""
        return sum(row.bytes_as_float for row in self.quantized) / max(self.bytes_as_float, 1)

    @property
    def bits(self) -> float:
        """Bits per weight of the quantised layers, scales included."""
        weights = sum(row.parameters for row in self.quantized)
        return sum(row.bits * row.parameters for row in self.quantized) / max(weights, 1)

    def summary(self) -> str:
        linears = [row for row in self.rows if row.linear]
        quantized = [row for row in linears if row.quantized]
        experts = sum(row.kind.startswith("Experts") for row in self.quantized)
        tables = len(self.quantized) - len(quantized) - experts
        also = f" and {experts} expert weights" if experts else ""
        also += f" and {tables} embedding{'s' if tables > 1 else ''}" if tables else ""
        if not self.quantized:
            return f"0 of {len(linears)} linear layers quantised, {readable(self.bytes)}"
        formats = sorted({row.format for row in self.quantized})
        kept = [row.name for row in linears if not row.quantized]
        line = (
            f"{len(quantized)} of {len(linears)} linear layers{also} quantised to {', '.join(formats)}: "
            f"{self.fraction:.1%} of the bytes, "
            f"{self.bits:.2f} bits per weight, {readable(self.bytes_as_float)} -> {readable(self.bytes)}"
        )
        return line + (f"; kept: {listed(kept)}" if kept else "")

    def text(self, every: bool = False) -> str:
        """A table. Rows that differ only in their numbering ("layers.0", "layers.1") are one line unless ``every``."""
        groups = {}
        for row in self.rows:
            name = row.name if every else re.sub(r"\b\d+\b", "*", row.name)
            groups.setdefault((name, row.kind, row.format, row.why, row.kernel), []).append(row)
        errors = any(row.error is not None for row in self.rows)
        table = [("module", "class", "format", "bits", "bytes", *(["error"] if errors else []), "kernel / why float")]
        for (name, kind, form, why, kernel), rows in groups.items():
            many = f" x{len(rows)}" if len(rows) > 1 else ""
            worst = max((row.error for row in rows if row.error is not None), default=None)
            weights = sum(row.parameters for row in rows)
            bits = sum(row.bits * row.parameters for row in rows) / max(weights, 1)
            table.append(
                (
                    name + many,
                    kind,
                    form,
                    f"{bits:.2f}" if weights else "",
                    readable(sum(row.bytes for row in rows)),
                    *(["" if worst is None else f"{worst:.4f}"] if errors else []),
                    kernel or why,
                )
            )
        return f"{self.summary()}\n\n{align(table)}"

    __str__ = text

    def to_dict(self) -> dict:
        return {
            "summary": self.summary(),
            "bytes": self.bytes,
            "bytes_as_float": self.bytes_as_float,
            "bits": self.bits,
            "fraction": self.fraction,
            "rows": [asdict(row) for row in self.rows],
        }


def report(
    model: torch_nn.Module, against: torch_nn.Module | None = None, *, kept: dict[str, str] | None = None
) -> Report:
    """Say for every module that owns tensors what it is, what it takes and why it is float.

    Args:
        against: the float model with the same module names; each quantised weight is then compared with it.
        kept: linear layer -> why it was kept; None finds out by the model's settings and the default rules.

    A name of a quantised layer that ``against`` lacks, or has in another shape, is a ValueError.
    """
    kept = find_kept(model) if kept is None else kept
    first = {id(tensor): name for name, tensor in tensors_of(model)}
    rows = []
    for name, module in model.named_modules():
        tensors = {
            **{k: v for k, v in module._parameters.items() if v is not None},
            **{k: v for k, v in module._buffers.items() if v is not None},
        }
        if not tensors:
            continue
        owned = {k: v for k, v in tensors.items() if first[id(v)] == (f"{name}.{k}" if name else k)}
        tied = [k for k in tensors if k not in owned]
        row = (
            describe_quantized(name, module, owned)
            if isinstance(module, PackedModule)
            else describe_float(name, module, owned, kept)
        )
        if tied and not owned:
            row.why = f"tied to {first[id(tensors[tied[0]])]}"
        if against is not None and row.quantized:
            row.error = relative_error(name, module, against)
        rows.append(row)
    return Report(rows)


def describe_quantized(name: str, layer: PackedModule, owned: dict) -> Row:
    packed, weights = {key: layer._parameters[key] for key in layer.packed_spec()}, math.prod(layer.weight_shape)
    others = [tensor for key, tensor in owned.items() if key not in packed]
    logical = weights if "qweight" in owned else 0
    linear = isinstance(layer, nn.QuantizedLinear)
    return Row(
        name,
        type(layer).__name__,
        format_name(layer),
        8 * sum(map(size_of, packed.values())) / max(weights, 1),
        sum(map(size_of, owned.values())),
        logical + sum(tensor.numel() for tensor in others if tensor is not layer._parameters.get(LIKE)),
        True,
        "",
        "decodes the rows asked for" if isinstance(layer, nn.QuantizedEmbedding) else explain(layer).kernel,
        logical * layer.weight_dtype.itemsize + sum(map(size_of, others)),
        linear,
    )


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def describe_float(name: str, module: torch_nn.Module, owned: dict, kept: dict) -> Row:
    size = sum(map(size_of, owned.values()))
    count = sum(tensor.numel() for key, tensor in owned.items() if key in module._parameters)
    numbers = sum(tensor.numel() for tensor in owned.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in owned.values()})
    linear = isinstance(module, torch_nn.Linear) or nn.is_conv1d(module)
    if linear:
        why = kept.get(name, "not quantised")
    elif isinstance(module, (torch_nn.Embedding, torch_nn.EmbeddingBag)):
        why = f"embedding, {kept[name]}" if name in kept else "embedding"
    elif reasons := {kept[f"{name}.{key}"] for key in expert_weights(module) if f"{name}.{key}" in kept}:
        why = ", ".join(sorted(reasons))
    elif any(
        tensor.dim() >= 3 for key, tensor in owned.items() if key in module._parameters and "expert" in f"{name}.{key}"
    ):
        why = "3-D expert weights outside of Transformers' experts interface"
    else:
        why = "buffers" if not count else "not a linear layer"
    return Row(
        name,
        type(module).__name__,
        "/".join(dtypes),
        8 * size / max(numbers, 1),
        size,
        count,
        False,
        why,
        "",
        size,
        linear,
    )


def format_name(layer: PackedModule) -> str:
    if hasattr(layer, "quant_type"):
        return f"{layer.quant_type}/{layer.blocksize}" + ("+dq" if layer.double_quant else "")
    return f"int8/{layer.blocksize or 'row'}"


def find_kept(model: torch_nn.Module) -> dict[str, str]:
    """Linear layer or expert weight -> why it is float, by the settings the model was quantised with; {} for a float
    model."""
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        return {}
    from .config import BnbqConfig
    from .selection import select

    config = getattr(model, "bnbq_config", None) or getattr(getattr(model, "config", None), "quantization_config", None)
    return select(model, config if isinstance(config, BnbqConfig) else None, strict=False).kept


def relative_error(name: str, layer: PackedModule, against: torch_nn.Module) -> float | None:
    try:
        other = float_part(against, name)
        whole = isinstance(layer, QuantizedExperts) or isinstance(other, torch_nn.Embedding)
        weight = other.weight.detach() if whole else nn.dense_weight(other)
    except (AttributeError, TypeError) as error:
        kind = "expert weight" if isinstance(layer, QuantizedExperts) else "linear layer"
        raise ValueError(f"report: against has no {kind} {name!r}: {error}") from None
    if tuple(weight.shape) != layer.weight_shape:
        raise ValueError(f"report: {name} is {list(layer.weight_shape)}, in against it is {list(weight.shape)}")
    if weight.is_meta or layer.qweight.is_meta:
        return None
    weight = weight.float()
    norm = weight.norm().item()
    difference = (layer.dequantize(torch.float32) - weight.to(layer.qweight.device)).norm().item()
    return difference / norm if norm else (math.inf if difference else 0.0)


def largest_unquantized(rows: list[Row], count: int = 3) -> str:
    """For a warning: "model.layers.*.mlp.experts (5.2 GB, 3-D expert weights ...)"; like-named rows are added up."""
    sums = {}
    for row in rows:
        key = re.sub(r"\b\d+\b", "*", row.name) or "(the model itself)", row.why
        sums[key] = sums.get(key, 0) + row.bytes
    largest = sorted(sums.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} ({readable(size)}, {why})" for (name, why), size in largest)


def readable(size: int) -> str:
    """1536 -> "1.5 kB"; decimal units."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} B"


def align(table: list[tuple[str, ...]]) -> str:
    """Lines of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def listed(names: list[str], most: int = 4) -> str:
    names = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------ kernels


@dataclass
class Explanation:
    """Which kernel a layer runs, and why: ``str(explanation)`` is a few lines."""

    layer: str
    kernel: str  # "q4 avx512", "q4 scalar, blocks cross rows", "none: on meta"
    compute_dtype: str
    reasons: list[str]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.layer}: {self.kernel}, computes in {self.compute_dtype}",
                *(f"  {reason}" for reason in self.reasons),
            ]
        )


def explain(layer: nn.QuantizedLinear | QuantizedExperts, m: int | None = None) -> Explanation:
    """Say which kernel multiplies by this layer's weight on this machine, and why.

    Args:
        m: rows of the input, of experts those that one of them gets; None tells where the choice depends on it.

    The input is taken to have the dtype that the layer's weight reports. Raises TypeError for another kind of module.
    """
    if not isinstance(layer, (nn.QuantizedLinear, QuantizedExperts)):
        raise TypeError(f"explain: got {type(layer).__name__}, expected a quantised layer of bnbq.nn")
    if m is not None and (isinstance(m, bool) or not isinstance(m, int) or m < 0):
        raise ValueError(f"explain: m is {m!r}, expected a number of rows")
    four = hasattr(layer, "quant_type")
    crossing = four and layer.in_features % layer.blocksize != 0
    family = "s8" if not four else "w4a8" if layer.activations and not crossing else "q4"
    dtype = str((layer.compute_dtype if four else None) or layer.weight_dtype).removeprefix("torch.")
    device = layer.qweight.device
    if device.type == "meta":  # unfilled, or offloaded: then Accelerate's hook knows where it will run
        hook = getattr(layer, "_hf_hook", None)
        runs_on = getattr(hook, "execution_device", None)
        device = device if runs_on is None else torch.device(runs_on)
    if device.type == "meta":
        return Explanation(layer.describe(), "none: the layer is on meta", dtype, [])
    if device.type == "cuda" and _bnbq.build_info()["cuda"]:
        return explain_cuda(layer, device, dtype, m)
    if device.type != "cpu":
        return Explanation(layer.describe(), f"none: this build of bnbq has no kernels for {device}", dtype, [])
    rows = [row for row in _bnbq.rows() if row["family"] == family]
    used = next(i for i, row in enumerate(rows) if row["in_use"])
    row, kernel = rows[used], f"{family} {rows[used]['isa']}"
    reasons = [f"needs {' '.join(row['needs'])}, which this CPU has" if row["needs"] else "runs on every CPU"]
    for faster in rows[used + 1 :]:
        missing = faster["missing"]
        reasons.append(
            f"not {faster['isa']}: "
            + (f"this CPU lacks {' '.join(missing)}" if missing else "capped by BNBQ_ISA or set_isa")
        )
    if crossing:
        kernel += ", blocks cross rows"
        reasons.append(
            f"in_features {layer.in_features} is no multiple of blocksize {layer.blocksize}: the generic path decodes "
            "the rows to fp32 first (correct, not fast)"
        )
    elif family == "w4a8":
        kernel += ", int8 activations"
        reasons.append("activations='int8': x and the codebook are rounded to int8, which costs quality")
    elif four and dtype == "bfloat16":
        reasons.append(bfloat16_reason(row["bf16_min_m"], row["bf16_max_m"], m))
    if not four:
        reasons.append(outlier_reason(layer.threshold))
    if isinstance(layer, QuantizedExperts):
        reasons.append("expert by expert, only those that rows are routed to")
    return Explanation(layer.describe(), kernel, dtype, reasons)


def explain_cuda(layer: nn.QuantizedLinear, device: torch.device, dtype: str, m: int | None) -> Explanation:
    four = isinstance(layer, nn.Linear4bit)
    reasons = [f"it lies on {device}; the kernels are compiled for {_bnbq.build_info()['cuda_archs']}"]
    if not four:
        reasons.append(outlier_reason(layer.threshold))
        return Explanation(layer.describe(), "s8 cuda", dtype, reasons)
    if layer.activations:
        reasons.append("activations='int8' changes nothing on a GPU")
    least, kernel = ops_library.DENSE_ROWS, "q4 cuda"
    if _bnbq.batch_invariant():
        reasons.append("batch invariant: the fused kernel for every m")
    elif layer.compute_dtype not in (None, layer.weight_dtype):
        reasons.append("inputs are rounded to another dtype: the fused kernel for every m")
    else:
        reasons.append(f"from m = {least} on the weight is dequantised and multiplied by cuBLAS")
        kernel += " dequantise, then cuBLAS" if m is not None and m >= least else ""
    return Explanation(layer.describe(), kernel, dtype, reasons)


def outlier_reason(threshold: float) -> str:
    if not threshold:
        return "no outliers: threshold is 0"
    return f"activations of at least {threshold:g} are multiplied in float"


def bfloat16_reason(least: int, most: int, m: int | None) -> str:
    """For which numbers of rows the product of bf16 rounds the weights or their codebook to bf16."""
    if _bnbq.batch_invariant():
        return "batch invariant: the fp32 kernel for every m"
    if least == 0:
        return "bf16 inputs: the fp32 kernel for every m, this instruction set has no bf16 one"
    where = f"from m = {least} on" if most > 1 << 32 else f"for m = {least} to {most}"
    if m is None:
        return f"the bf16 kernel {where}, else the fp32 one"
    return f"m = {m}: the {'bf16' if least <= m <= most else 'fp32'} kernel (bf16 {where})"
