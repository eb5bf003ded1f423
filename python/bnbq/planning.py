"""``bnbq.plan``: what a quantised model takes and which device each part goes to, before anything is loaded.

The model is built on the meta device by the steps that loading takes, up to where the weights would be read; of the
files only headers are. So the sizes are those of the model once loaded, to the byte, and the devices are those that
Accelerate chooses for them (placement.py).
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import placement, replace, shards, stream
from .packed import PackedModule
from .report import align, readable, report, size_of, tensors_of


@dataclass
class PlannedModule:
    """Tensors of one module that go to one device. Tied ones belong to the first module that has them."""

    name: str
    kind: str  # class name
    format: str  # "nf4/64+dq", "bfloat16"
    bytes: int
    device: int | str


@dataclass
class Plan:
    """``str(plan)`` is a table; ``device_map`` is for from_pretrained, quantize_model and load_and_quantize."""

    device_map: dict
    modules: list[PlannedModule]
    memory: dict  # bytes that may be used, by device

    @property
    def bytes(self) -> int:
        return sum(module.bytes for module in self.modules)

    @property
    def used(self) -> dict:
        """Bytes by device, those that get nothing included."""
        used = Counter(dict.fromkeys(self.memory, 0))
        for module in self.modules:
            used[module.device] += module.bytes
        return dict(used)

    @property
    def left(self) -> dict:
        """Bytes of ``memory`` that the weights leave: for activations, gradients and the key-value cache."""
        used = self.used
        return {device: size - used[device] for device, size in self.memory.items()}

    @property
    def fits(self) -> bool:
        """Whether nothing has to stay on disk."""
        return not self.used.get("disk")

    def summary(self) -> str:
        parts = []
        for device, used in self.used.items():
            left = f", {readable(self.left[device])} left" if device in self.memory else ""
            parts.append(f"{readable(used)} on {name_of(device)}{left}")
        line = f"{readable(self.bytes)}: {'; '.join(parts)}"
        if not self.fits:
            line += (
                f"\ndoes not fit: {readable(self.used['disk'])} stay on disk (offload_folder) and are read for each "
                "forward; Accelerate keeps room for the largest layer of them"
            )
        return line

    def text(self, every: bool = False) -> str:
        """A table. Modules that differ only in their numbering are one line unless ``every``."""
        groups = {}
        for row in self.modules:
            name = row.name if every else stream.wildcards(row.name)
            groups.setdefault((name, row.kind, row.format, row.device), []).append(row.bytes)
        table = [("module", "class", "format", "bytes", "device")]
        for (name, kind, form, device), sizes in groups.items():
            many = f" x{len(sizes)}" if len(sizes) > 1 else ""
            table.append((name + many, kind, form, readable(sum(sizes)), name_of(device)))
        return f"{self.summary()}\n\n{align(table)}"

    __str__ = text


def plan(model, memory: Mapping | None = None, config=None, *, strategy: str = "auto") -> Plan:
    """Say which device each module of a quantised model would go to, and what is left there.

    Args:
        model: a checkpoint's directory, float or saved by bnbq or bitsandbytes, of which only headers are read; or a
            model, float (planned as if quantised; it is left as it is, and may be on meta) or quantised.
        memory: bytes by device, as Accelerate's max_memory: ``{0: "24GB", "cpu": "64GiB"}``. The devices need not be
            there. None is what is free on this machine.
        config: BnbqConfig, BitsAndBytesConfig or None: nf4, or what the checkpoint says. An error for a model that is
            quantised already.
        strategy: "auto", "balanced", "balanced_low_0" or "sequential". Accelerate balances over GPUs only where there
            are some; without, each strategy fills the devices in order.

    Weights and buffers are counted (Accelerate keeps the buffers of what is on disk, a few bytes, in memory);
    activations and the key-value cache need room beside them. Loading with ``device_map="auto"`` may choose otherwise,
    since Transformers keeps a reserve: pass ``device_map=plan.device_map``.

    Raises ValueError or TypeError for bad arguments, UserError (a ValueError) for what is no whole checkpoint.
    """
    if strategy not in placement.STRATEGIES:
        raise ValueError(f"plan: strategy is {strategy!r}, expected one of {', '.join(placement.STRATEGIES)}")
    memory = check_memory(memory)
    if isinstance(model, (str, os.PathLike)):
        model = model_of_folder(Path(model), config)
    elif isinstance(model, torch.nn.Module):
        model = quantized_twin(model, config)
    else:
        raise TypeError(f"plan: got a {type(model).__name__}, expected a model or the directory of a checkpoint")
    device_map = placement.plan(model, strategy, dict(memory))
    rows = {row.name: row for row in report(model).rows}
    sizes = Counter()
    for name, tensor in tensors_of(model):
        sizes[name.rpartition(".")[0], device_of(name, device_map)] += size_of(tensor)
    modules = [
        PlannedModule(name, rows[name].kind, rows[name].format, size, device) for (name, device), size in sizes.items()
    ]
    return Plan(dict(device_map), modules, memory)


def check_memory(memory) -> dict:
    """Bytes by device, GPUs first."""
    if memory is not None and not isinstance(memory, Mapping):
        raise TypeError(f"plan: memory is {memory!r}, expected bytes by device such as {{0: '24GB', 'cpu': '64GB'}}")
    for device, size in (memory or {}).items():
        if isinstance(size, bool) or not isinstance(size, (int, str)) or (isinstance(size, int) and size < 0):
            raise ValueError(f"plan: memory[{device!r}] is {size!r}, expected bytes, or a size such as '24GB'")
    if memory is not None and not memory:
        raise ValueError("plan: memory is empty, expected bytes by device such as {0: '24GB', 'cpu': '64GB'}")
    return placement.import_accelerate().utils.get_max_memory(None if memory is None else dict(memory))


def device_of(name: str, device_map: Mapping) -> int | str:
    """The entry of a device map that a tensor falls under: the longest name."""
    while name not in device_map:
        if not name:
            raise ValueError("plan: the device map does not say where every tensor goes")
        name = name.rpartition(".")[0]
    return device_map[name]


def name_of(device: int | str) -> str:
    return f"GPU {device}" if isinstance(device, int) else str(device)


# ------------------------------------------------------------------ the model without its weights


def quantized_twin(model: torch.nn.Module, config) -> torch.nn.Module:
    """The model, if it is quantised; else a copy of it on meta that is."""
    if any(isinstance(module, PackedModule) for module in model.modules()):
        if config is not None:
            raise ValueError(f"plan: {type(model).__name__} is quantised already; a config is for float models")
        return model
    memo = {}  # what deepcopy takes for copied: no weight is
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    twin = copy.deepcopy(model, memo)
    replace.quantize_model(twin, config)
    return twin


def model_of_folder(folder: Path, config) -> torch.nn.Module:
    """The model that ``bnbq.from_pretrained`` would load from a directory, on meta."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from .integrations.loading import merge_settings, resolve_settings, stored_settings_owner
    from .integrations.transformers import BnbqConfig, BnbqQuantizer

    source = shards.Source(folder)
    empty, dtype = stream.meta_model(folder, stream.read_json(folder), source)
    stored = getattr(stored_settings_owner(empty.config), "quantization_config", None)
    wanted = resolve_settings(config, {})
    if stored is None:
        settings = wanted or BnbqConfig()
    else:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        method = stored.get("quant_method", "bitsandbytes")
        if method not in ("bnbq", "bitsandbytes"):
            raise ValueError(f"plan: {folder} is quantised with {method}, which bnbq does not load")
        settings = merge_settings(stored, wanted, {}, config is not None, folder)
    with torch.device("meta"):
        model = type(empty)._from_config(empty.config, dtype=dtype)
    quantizer = BnbqQuantizer(BnbqConfig.from_dict(settings.to_native_dict()), pre_quantized=stored is not None)
    files = [str(folder / file) for file in source.files]
    quantizer.preprocess_model(model, dtype=dtype, device_map=None, checkpoint_files=files)
    get_model_conversion_mapping(model, None, quantizer)  # where the quantiser sees which weights the files have
    keep_in_fp32(model, dtype)
    model.tie_weights(recompute_mapping=False)
    return model


def keep_in_fp32(model, dtype: torch.dtype) -> None:
    """As loading does: what a model class wants in float32 is there, whatever the dtype of the rest."""
    from transformers.core_model_loading import build_glob_alternation

    wanted = model._get_dtype_plan(dtype)
    if not wanted:
        return
    pattern = build_glob_alternation(list(wanted))[0]
    for module_name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{module_name}.{leaf}"
            if parameter is not None and not isinstance(module, PackedModule) and pattern.search(name):
                module._parameters[leaf] = torch.nn.Parameter(parameter.float(), parameter.requires_grad)
