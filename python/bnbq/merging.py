"""Merging an adapter into a quantised base, and saying what is left of it.

A 4-bit step is about a tenth of a weight, what an adapter adds mostly less than a hundredth: rounded to the grid again,
a small adapter is gone. `merge` measures that for each layer before it changes any. With W the weight that the base
stands for, M the weight that PEFT's merge of the adapter gives in float32, and R the weight that the merged layer
would stand for::

    asked = M - W
    R - W = kept * asked + noise      noise orthogonal to asked: kept = <R - W, asked> / <asked, asked>

``kept`` is the part of the adapter that survives. ``noise`` is incoherent and mostly harmless: its norm over that of W
compares with the 0.09 or so that quantising to 4 bits has cost already, and the 0.001 of rounding to bfloat16.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import torch

from .experts import QuantizedExperts
from .nn import QuantizedLinear
from .packed import PackedModule
from .report import format_name
from .scale_search import requantize
from .side_branch import LowRank, SideBranch, attach

KEEP = ("quantized", "side-branch", "bf16")


@dataclass
class MergedLayer:
    """One layer; norms are Frobenius norms."""

    name: str
    becomes: str  # "nf4/64+dq", "nf4/64 + rank 16", "bfloat16"
    asked: float  # |asked| / |W|
    kept: float
    noise: float  # |noise| / |W|


@dataclass
class Merge:
    """What `merge` did or, in a MergeRefused, would have done. ``str(merge)`` is a table."""

    model: torch.nn.Module | None  # without adapters
    layers: list[MergedLayer] = field(default_factory=list)

    @property
    def worst(self) -> MergedLayer | None:
        """The layer that keeps least; None if no quantised layer was merged."""
        return min(self.layers, key=lambda layer: layer.kept, default=None)

    def text(self, every: bool = False) -> str:
        """A table with a line for each layer, or (default) the worst of those that differ only in their numbering."""
        groups: dict[str, list[MergedLayer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.name if every else re.sub(r"\b\d+\b", "*", layer.name), []).append(layer)
        lines = [("layer", "becomes", "asked", "kept", "noise")]
        for name, layers in groups.items():
            worst = min(layers, key=lambda layer: layer.kept)
            many = f" x{len(layers)}, worst" if len(layers) > 1 else ""
            numbers = (f"{value:.4f}" for value in (worst.asked, worst.kept, worst.noise))
            lines.append((name + many, worst.becomes, *numbers))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    __str__ = text


class MergeRefused(ValueError):
    """Too much of an adapter would be lost, and nothing was changed; ``merge.layers`` says what of which layer."""

    def __init__(self, message: str, merge: Merge):
        super().__init__(message)
        self.merge = merge


def merge(
    model,
    keep: str = "quantized",
    *,
    min_kept: float = 0.9,
    force: bool = False,
    adapter_names: list[str] | None = None,
) -> Merge:
    """Merge the adapters of a PeftModel on a quantised base and unload PEFT, unless too much of them would be lost.

    Args:
        model: a PeftModel, nothing merged yet. Any tuner that PEFT can merge will do.
        keep: what becomes of a quantised layer with an adapter.
            "quantized": the merged weight in the layer's format, scales searched (scale_search.py).
            "side-branch": the base's bytes, and beside them the adapter's low-rank product in float (side_branch.py):
            exact, saved and loaded with the model. LoRA only, not its variants such as DoRA.
            "bf16": an nn.Linear with the merged weight in bfloat16. The other float parameters are cast to it too.
        min_kept: the least ``kept`` (head of this file) of a layer to accept.
        force: merge whatever is kept.
        adapter_names: None is the active ones.

    Adapters on float layers are merged by PEFT. Returns a Merge with the model and a row for each quantised layer.
    Until all layers are measured their results are held beside the model: packed, or in bfloat16.

    Raises MergeRefused (a ValueError) when a layer keeps less than ``min_kept``, TypeError for another kind of model,
    ValueError for an adapter that is not finite or not low-rank, is merged already, or lies on an offloaded layer,
    naming the layer. The model is as it was after any of them.
    """
    if keep not in KEEP:
        raise ValueError(f"merge: keep is {keep!r}, expected one of {', '.join(map(repr, KEEP))}")
    base = adapted_model(model)
    tuners = check(base)
    plans = {name: plan(name, tuner, keep, adapter_names) for name, tuner in tuners.items()}
    result = Merge(None, [planned.row for planned in plans.values()])
    lossy = [row for row in result.layers if not row.kept >= min_kept]
    if lossy and not force:
        raise MergeRefused(
            f"merge: refused, and nothing was changed: {len(lossy)} of {len(plans)} layers would keep less than "
            f"{min_kept:g} of what the adapter changes; {result.worst.name} would keep {result.worst.kept:.3f}. "
            "keep='side-branch' is exact, keep='bf16' nearly; force=True merges all the same",
            result,
        )
    kinds = float_kinds(base, tuners) if keep == "bf16" else {}
    merged = {tuner: plans[name].carry_out(kinds.get(name)) for name, tuner in tuners.items()}
    for place, module in list(base.named_modules(remove_duplicate=False)):
        if module in merged:
            base.set_submodule(place, merged[module])
    result.model = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)  # those on float layers
    if keep == "bf16":
        settle_bf16(result.model, tuners)
    return result


# ------------------------------------------------------------------ what there is


def adapted_model(model):
    """The model inside a PeftModel whose adapters can be merged."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, BaseTuner):
        raise TypeError(
            f"merge: got {type(model).__name__}, expected a PeftModel with adapters in its layers (not a prompt)"
        )
    tuner._check_merge_allowed()
    return tuner.model


def check(base: torch.nn.Module) -> dict:
    """Name -> tuner layer for those on quantised layers, once nothing is found that would stop the merge halfway."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = {}
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ValueError(f"merge: {name}: {', '.join(module.merged_adapters)} is merged already; unmerge it first")
        for key, parameter in module.named_parameters():
            if not key.startswith("base_layer.") and not parameter.is_meta and not torch.isfinite(parameter).all():
                raise ValueError(f"merge: {name}.{key} of the adapter is not finite")
        layer = getattr(module, "base_layer", None)
        if any(isinstance(part, QuantizedExperts) for part in getattr(layer, "_modules", {}).values()):
            raise ValueError(
                f"merge: {name} adapts quantised experts, of which nothing is measured here; keep the adapter, or use "
                "PEFT's merge_and_unload(), which requantises the experts with it"
            )
        if isinstance(layer, QuantizedLinear):
            if layer.qweight.is_meta:
                raise ValueError(f"merge: {name} is offloaded or has no data; load the model into memory to merge")
            tuners[name] = module
    return tuners


def merged_weight(name: str, tuner, adapter_names):
    """What PEFT's own merge makes of the layer in float32: weight [n, k] and bias or None. Nothing is changed."""
    layer = tuner.base_layer
    with torch.device("meta"):
        twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    twin.weight = torch.nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
    if layer.bias is not None:
        twin.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    probe = copy.copy(tuner)
    for key, value in vars(tuner).items():  # PEFT notes in these what is merged
        if isinstance(value, (dict, list)):
            probe.__dict__[key] = copy.copy(value)
    probe._modules["base_layer"] = twin
    try:
        with torch.no_grad():
            probe.merge(safe_merge=True, adapter_names=adapter_names)
    except ValueError as error:
        raise ValueError(f"merge: {name}: {error}") from None
    return twin.weight.detach(), None if twin.bias is None else twin.bias.detach()


# ------------------------------------------------------------------ what becomes of a layer


class Plan:
    """A layer's merge, computed and not yet done. Subclasses say how the weight is held."""

    def __init__(self, layer: QuantizedLinear, bias):
        self.layer, self.bias, self.row = layer, bias, None

    def becomes(self) -> str:
        raise NotImplementedError

    def weight(self) -> torch.Tensor:
        """What the merged layer will stand for, float32[n, k]."""
        raise NotImplementedError

    def carry_out(self, kind) -> torch.nn.Module:
        """The merged layer; ``kind`` is the class of a float one."""
        if self.bias is not None:
            self.layer.bias.data.copy_(self.bias)
        return self.layer

    def measure(self, name: str, dense: torch.Tensor) -> None:
        """Fill in ``row``; ``dense`` is the weight asked for."""
        weight = self.layer.dequantize(torch.float32)
        asked, realised, size = dense - weight, self.weight() - weight, weight.norm().clamp_min(1e-30)
        square = asked.square().sum()
        kept = (realised * asked).sum() / square if square else torch.ones(())
        noise = (realised - kept * asked).norm() / size
        self.row = MergedLayer(name, self.becomes(), (square.sqrt() / size).item(), kept.item(), noise.item())


class Requantized(Plan):
    def __init__(self, layer, bias, dense):
        super().__init__(layer, bias)
        branch = layer.side_branch.product() if isinstance(layer, SideBranch) else 0  # it stays
        self.packed = requantize(layer, dense - branch)

    def becomes(self):
        return format_name(self.layer)

    def weight(self):
        probe = copy.copy(self.layer)
        probe.__dict__["_parameters"] = {**self.layer._parameters, **self.packed}
        return probe.dequantize(torch.float32)

    def carry_out(self, kind):
        self.layer._fill(self.packed)
        return super().carry_out(kind)


class Branched(Plan):
    def __init__(self, layer, bias, a, b):
        super().__init__(layer, bias)
        self.a, self.b = a, b

    def becomes(self):
        return f"{format_name(self.layer)} + rank {self.a.shape[0]}"

    def weight(self):
        return self.layer.dequantize(torch.float32) + self.b.float() @ self.a.float()

    def carry_out(self, kind):
        attach(self.layer, self.a, self.b)
        return super().carry_out(kind)


class Float(Plan):
    def __init__(self, layer, bias, dense):
        super().__init__(layer, bias)
        self.dense = dense.to(torch.bfloat16)

    def becomes(self):
        return "bfloat16"

    def weight(self):
        return self.dense.float()

    def carry_out(self, kind):
        from .integrations.transformers import float_layer

        super().carry_out(kind)
        return float_layer(self.layer, torch.bfloat16, kind, self.dense)


@torch.no_grad()
def plan(name: str, tuner, keep: str, adapter_names) -> Plan:
    layer = tuner.base_layer
    dense, bias = merged_weight(name, tuner, adapter_names)
    if keep == "quantized":
        made = Requantized(layer, bias, dense)
    elif keep == "side-branch":
        made = Branched(layer, bias, *low_rank(name, tuner, adapter_names))
    else:
        made = Float(layer, bias, dense)
    made.measure(name, dense)
    return made


def low_rank(name: str, tuner, adapter_names) -> tuple[torch.Tensor, torch.Tensor]:
    """a [r, k] and b [n, r] of all adapters to be merged, the scaling in b. ValueError if they are not low-rank."""
    from peft.tuners.lora import Linear

    chosen = [adapter for adapter in adapter_names or tuner.active_adapters if adapter in getattr(tuner, "lora_A", ())]
    if not isinstance(tuner, Linear) or any(adapter in tuner.lora_variant for adapter in chosen):
        raise ValueError(
            f"merge: {name}: keep='side-branch' is for LoRA without variants, whose change of the weight is a low-rank "
            f"product; this is {type(tuner).__module__}.{type(tuner).__name__} "
            f"{dict(getattr(tuner, 'lora_variant', {})) or ''}; expected keep='quantized' or 'bf16'"
        )
    a = [tuner.lora_A[adapter].weight for adapter in chosen]
    b = [tuner.lora_B[adapter].weight * tuner.scaling[adapter] for adapter in chosen]
    if not chosen:
        a, b = [torch.empty(0, tuner.in_features)], [torch.empty(tuner.out_features, 0)]
    return torch.cat(a).detach().clone(), torch.cat(b, 1).detach()


# ------------------------------------------------------------------ float layers


def float_kinds(base: torch.nn.Module, tuners: dict) -> dict:
    """Name -> class of the float layer that a quantised one was: nn.Linear, or transformers' Conv1D."""
    from .integrations.transformers import original_kinds

    layers = {name: tuner.base_layer for name, tuner in tuners.items()}
    if hasattr(base, "save_pretrained"):
        return original_kinds(base, layers)
    return {name: getattr(layer, "source_cls", torch.nn.Linear) for name, layer in layers.items()}


def settle_bf16(model: torch.nn.Module, names) -> None:
    """Cast float parameters to bfloat16, and let a Transformers model know which layers are quantised no more.

    Buffers stay: rotary frequencies are float32 in a bfloat16 model too. So do side branches, for exactness.
    """
    for module in model.modules():
        if isinstance(module, LowRank):
            continue
        packed = ()
        if isinstance(module, PackedModule):
            packed, module.weight_dtype = module.packed_spec(), torch.bfloat16
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and key not in packed:
                parameter.data = parameter.data.to(torch.bfloat16)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    quantizer.names.difference_update(names)
    if not quantizer.names:
        model.dequantize()  # removes the settings: a checkpoint without quantised layers is an ordinary one
