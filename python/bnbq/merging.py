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
from .integrations.offload import check_readable, check_writable, is_offloaded, onloaded, write
from .nn import QuantizedLinear
from .packed import PackedModule
from .report import format_name
from .scale_search import requantize
from .side_branch import LowRank, SideBranch, attach

KEEP = ("quantized", "side-branch", "bf16")


@dataclass
class MergedLayer:
    """One layer, or one expert's matrix; norms are Frobenius norms."""

    name: str  # of experts with the number of the expert: "model.layers.0.mlp.experts.down_proj.7"
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
            exact, saved and loaded with the model. LoRA only, not its variants such as DoRA, and not on experts.
            "bf16": an nn.Linear (of experts their Parameter) with the merged weight in bfloat16. The other float
            parameters are cast to it too, so no part of the model may be offloaded.
        min_kept: the least ``kept`` (head of this file) of a layer to accept.
        force: merge whatever is kept.
        adapter_names: None is the active ones.

    Experts are merged one by one. What Accelerate offloads is read and written where it keeps it: in memory, or in the
    offload folder (never in the checkpoint). Adapters on float layers are merged by PEFT. Returns a Merge with the
    model and a row for each quantised layer. Until all layers are measured their results are held beside the model:
    packed, or in bfloat16.

    Raises MergeRefused (a ValueError) when a layer keeps less than ``min_kept``, TypeError for another kind of model,
    ValueError for an adapter that is not finite, is merged already, or cannot be kept in the way asked for, naming the
    layer. The model is as it was after any of them.
    """
    if keep not in KEEP:
        raise ValueError(f"merge: keep is {keep!r}, expected one of {', '.join(map(repr, KEEP))}")
    base = adapted_model(model)
    tuners = check(base, keep)
    plans = {name: plan(name, tuner, keep, adapter_names) for name, tuner in tuners.items()}
    result = Merge(None, [row for planned in plans.values() for row in planned.rows])
    lossy = [row for row in result.layers if not row.kept >= min_kept]
    if lossy and not force:
        raise MergeRefused(
            f"merge: refused, and nothing was changed: {len(lossy)} of {len(result.layers)} layers would keep less "
            f"than {min_kept:g} of what the adapter changes; {result.worst.name} would keep {result.worst.kept:.3f}. "
            "keep='side-branch' is exact, keep='bf16' nearly; force=True merges all the same",
            result,
        )
    kinds = float_kinds(base, tuners) if keep == "bf16" else {}
    merged = {tuner: plans[name].carry_out(kinds.get(name)) for name, tuner in tuners.items()}
    for place, module in list(base.named_modules(remove_duplicate=False)):
        if module in merged:
            base.set_submodule(place, merged[module])
    result.model = unload(model, base, adapter_names)
    if keep == "bf16":
        settle_bf16(result.model, [name for planned in plans.values() for name in planned.names])
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


def check(base: torch.nn.Module, keep: str) -> dict:
    """Name -> tuner layer for those on quantised layers, once nothing is found that would stop the merge halfway."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    offloaded = next((name for name, module in base.named_modules() if is_offloaded(module)), None)
    if keep == "bf16" and offloaded is not None:
        raise ValueError(
            f"merge: keep='bf16' casts the whole model, and {offloaded or 'it'} is offloaded; load it into memory, or "
            "use keep='side-branch', which is exact"
        )
    tuners, tied = {}, getattr(base, "all_tied_weights_keys", None) or {}
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        check_adapter(name, module)
        layer = getattr(module, "base_layer", None)
        if parts := quantized_parts(layer):
            check_parts(name, module, parts, keep)
            if is_offloaded(parts[0]) and f"{name}.qweight" in {*tied, *tied.values()}:
                raise ValueError(f"merge: {name} is offloaded and shares its weight; load it into memory to merge")
            tuners[name] = module
        elif layer is not None and is_offloaded(layer):
            raise ValueError(
                f"merge: {name} is not quantised and offloaded, and PEFT would have to merge it; give it a device of "
                "its own, or load it into memory"
            )
    return tuners


def check_adapter(name: str, tuner) -> None:
    """ValueError for one that is merged already, lost or not finite."""
    if tuner.merged:
        raise ValueError(f"merge: {name}: {', '.join(tuner.merged_adapters)} is merged already; unmerge it first")
    with onloaded(*(part for key, part in tuner.named_children() if key != "base_layer")):
        for key, parameter in tuner.named_parameters():
            if key.startswith("base_layer."):
                continue
            if parameter.is_meta:
                raise ValueError(f"merge: {name}.{key} of the adapter is on the meta device and has no data")
            if not torch.isfinite(parameter).all():
                raise ValueError(f"merge: {name}.{key} of the adapter is not finite")


def check_parts(name: str, tuner, parts: list[PackedModule], keep: str) -> None:
    """ValueError for a tuner layer whose quantised parts cannot be merged like this."""
    if keep == "side-branch" and tuner.base_layer not in parts:
        raise ValueError(
            f"merge: {name} adapts quantised experts, which have no side branch; expected keep='quantized' or "
            "'bf16', or keep the adapter unmerged"
        )
    try:
        for part in parts:
            check_readable(part)
            if keep != "side-branch" or any(getattr(tuner, "lora_bias", {}).values()):
                check_writable(part)
    except ValueError as error:
        raise ValueError(f"merge: {name} {error}") from None


def quantized_parts(layer) -> list[PackedModule]:
    """What `merge` rewrites of a layer with an adapter: a linear layer, or the projections of an experts module."""
    if isinstance(layer, QuantizedLinear):
        return [layer]
    return [part for part in getattr(layer, "_modules", {}).values() if isinstance(part, QuantizedExperts)]


def merged_weight(name: str, tuner, adapter_names):
    """What PEFT's own merge makes of the layer in float32: weight [n, k], and the bias if it changes that. Nothing is
    changed."""
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
    same = twin.bias is None or torch.equal(twin.bias, layer.bias)
    return twin.weight.detach(), None if same else twin.bias.detach()


# ------------------------------------------------------------------ what becomes of a layer


class Plan:
    """A tuner layer's merge, computed and not yet done. Made while the layer is `onloaded`.

    ``rows`` says what would be kept, ``names`` which weights are quantised no more once it is done in float.
    """

    rows: list[MergedLayer]
    names: list[str]

    def carry_out(self, kind) -> torch.nn.Module:
        """What takes the tuner layer's place; ``kind`` is the class of a float one."""
        raise NotImplementedError


class LinearPlan(Plan):
    """The merge of a quantised linear layer, or of one expert as such. Subclasses say how the weight is held.

    ``dense`` is the weight asked for, float32[n, k].
    """

    def __init__(self, name: str, layer: QuantizedLinear, dense: torch.Tensor, bias=None):
        self.layer, self.bias, self.names = layer, bias, [name]
        self.rows = [self.measure(name, dense)]

    def becomes(self) -> str:
        raise NotImplementedError

    def weight(self) -> torch.Tensor:
        """What the merged layer will stand for, float32[n, k]."""
        raise NotImplementedError

    def changes(self) -> dict[str, torch.Tensor]:
        """New values of the layer's parameters."""
        return {} if self.bias is None else {"bias": self.bias}

    def carry_out(self, kind):
        write(self.layer, self.changes())
        return self.layer

    def measure(self, name: str, dense: torch.Tensor) -> MergedLayer:
        weight = self.layer.dequantize(torch.float32)
        asked, realised, size = dense - weight, self.weight() - weight, weight.norm().clamp_min(1e-30)
        square = asked.square().sum()
        kept = (realised * asked).sum() / square if square else torch.ones(())
        noise = (realised - kept * asked).norm() / size
        return MergedLayer(name, self.becomes(), (square.sqrt() / size).item(), kept.item(), noise.item())


class Requantized(LinearPlan):
    def __init__(self, name, layer, dense, bias=None):
        branch = layer.side_branch.product() if isinstance(layer, SideBranch) else 0  # it stays
        self.packed = requantize(layer, dense - branch)
        super().__init__(name, layer, dense, bias)

    def becomes(self):
        return format_name(self.layer)

    def weight(self):
        probe = copy.copy(self.layer)
        probe.__dict__["_parameters"] = {**self.layer._parameters, **self.packed}
        return probe.dequantize(torch.float32)

    def changes(self):
        return {**self.packed, **super().changes()}


class Branched(LinearPlan):
    def __init__(self, name, layer, dense, bias, a, b):
        self.a, self.b = a, b
        super().__init__(name, layer, dense, bias)

    def becomes(self):
        return f"{format_name(self.layer)} + rank {self.a.shape[0]}"

    def weight(self):
        return self.layer.dequantize(torch.float32) + self.b.float() @ self.a.float()

    def carry_out(self, kind):
        with onloaded(self.layer):  # it may have a branch to join
            attach(self.layer, self.a, self.b)
        return super().carry_out(kind)


class Float(LinearPlan):
    def __init__(self, name, layer, dense, bias=None):
        self.dense = dense.to(torch.bfloat16)
        super().__init__(name, layer, dense, bias)

    def becomes(self):
        return "bfloat16"

    def weight(self):
        return self.dense.float()

    def carry_out(self, kind):
        from .integrations.float_layers import float_layer

        super().carry_out(kind)
        return float_layer(self.layer, torch.bfloat16, kind, self.dense)


class Experts(Plan):
    """Both projections of an experts module, merged expert by expert."""

    def __init__(self, name: str, tuner, keep: str, adapters: list[str]):
        self.experts, self.rows, self.new = tuner.base_layer, [], {}
        for leaf in tuner.pairs():
            packed = getattr(self.experts, leaf)
            if keep == "quantized":
                new = {part: torch.empty_like(tensor) for part, tensor in packed.packed_tensors().items()}
            else:
                new = torch.empty(packed.weight_shape, dtype=torch.bfloat16, device=packed.qweight.device)
            for number in range(packed.num_experts):
                layer = packed.expert(number)
                dense = layer.dequantize(torch.float32)
                for adapter in adapters:
                    dense += tuner.expert_delta(leaf, adapter, number)
                made = (Requantized if keep == "quantized" else Float)(f"{name}.{leaf}.{number}", layer, dense)
                self.rows += made.rows
                if keep == "quantized":
                    for part, tensor in made.packed.items():
                        new[part][number] = tensor
                else:
                    new[number] = made.dense.T if packed.transposed else made.dense
            self.new[leaf] = new
        self.names = [f"{name}.{leaf}" for leaf in self.new]

    def carry_out(self, kind):
        from .replace import put

        for leaf, new in self.new.items():
            if isinstance(new, dict):
                write(getattr(self.experts, leaf), new)
            else:
                put(self.experts, leaf, torch.nn.Parameter(new))
        return self.experts


@torch.no_grad()
def plan(name: str, tuner, keep: str, adapter_names) -> Plan:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    layer = tuner.base_layer
    with onloaded(tuner):
        if not isinstance(layer, QuantizedLinear):
            chosen = [adapter for adapter in check_adapters_to_merge(tuner, adapter_names) if adapter in tuner.lora_A]
            return Experts(name, tuner, keep, chosen)
        dense, bias = merged_weight(name, tuner, adapter_names)
        if keep == "quantized":
            return Requantized(name, layer, dense, bias)
        if keep == "side-branch":
            return Branched(name, layer, dense, bias, *low_rank(name, tuner, adapter_names))
        return Float(name, layer, dense, bias)


def unload(model, base: torch.nn.Module, adapter_names) -> torch.nn.Module:
    """The model without PEFT, once its quantised layers are merged: merge what is left on float layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(base.modules())
    left = any(isinstance(m, BaseTunerLayer) or hasattr(m, "unload_and_optionally_merge_module") for m in modules)
    if left or not any(map(is_offloaded, modules)):
        return model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    base.__dict__.pop("peft_config", None)  # PEFT would bring each module into memory, the whole model to begin with
    return base


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
    from .integrations.float_layers import original_kinds

    layers = {name: t.base_layer for name, t in tuners.items() if isinstance(t.base_layer, QuantizedLinear)}
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
