"""What happens to a tensor between a checkpoint file and a quantised layer, as Transformers' WeightConverters.

Transformers renames each key of a checkpoint, hands it to at most one converter, and puts what the converter
returns where the device map says: memory, or a file for "disk". So these converters return packed tensors by
their full names and never touch the model, and offloading works like for any other parameter.

    `Quantize`            weight                               -> qweight, absmax, ...   while loading a float model
    `QuantizeConverted`   what a converter of the model makes  -> the same, for models that split, fuse or stack weights
    `ConvertFloat`        the model's converters in a quantised checkpoint: they must not touch packed tensors
    `ReadBitsandbytes`    bitsandbytes' names                  -> ours
    `WriteBitsandbytes`   ours -> bitsandbytes' names, while saving

They override the methods instead of giving operations to the stock class, for three reasons: a stock converter
for ``weight`` would catch every norm and embedding as well; an exception inside an operation is swallowed and
turned into a report; and saving has to see the layer's settings.
"""

from __future__ import annotations

import copy

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from ..checkpoint import PACKED_NAMES
from ..checkpoint_bnb import (
    BNB4_KEYS,
    BNB8_KEYS,
    bnb_from_native,
    describe,
    native_from_bnb4,
    native_from_bnb8,
)
from ..experts import QuantizedExperts
from ..state import LIKE

BNB_KEYS = tuple(sorted({*BNB4_KEYS, *BNB8_KEYS}, key=len, reverse=True))


class Keep(ConversionOps):
    """Does nothing: a converter must name an operation."""

    def convert(self, input_dict, source_patterns=None, target_patterns=None, **kwargs):
        return input_dict

    @property
    def reverse_op(self):
        return self


class Converter(WeightConverter):
    """Base: knows the quantiser, and is copied (once per layer) without copying that."""

    sources: tuple = ()
    target = "qweight"

    def __init__(self, quantizer):
        super().__init__(list(self.sources), self.target, [Keep()])
        self.quantizer = quantizer

    def __deepcopy__(self, memo):
        return type(self)(self.quantizer)

    def one_of_each(self) -> dict:
        """The collected tensors; each name occurs once per layer."""
        return {name: tensors[0] for name, tensors in self.materialize_tensors().items() if tensors}


class Quantize(Converter):
    """The dense weight of a layer, quantised where it lies, one at a time."""

    sources = ("weight",)

    def rename_source_key(self, source_key):
        module, _, leaf = source_key.rpartition(".")
        name = module if leaf == "weight" and self.quantizer.owns(module) else source_key
        if not self.quantizer.owns(name):  # experts are a Parameter of their own name
            return source_key, None
        self._was_used = True
        return f"{name}.qweight", "weight"

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        return quantize_weight(model, layer_name.rpartition(".")[0], self.one_of_each()["weight"], self.quantizer)

    def reverse_transform(self):
        raise NotImplementedError("a quantised weight is not saved as the float weight it came from")


class WrappedConverter(WeightConverter):
    """A converter of the model, and what we do before or after it. ``inner`` is what saving reverses."""

    def __init__(self, inner: WeightConverter, quantizer):
        super().__init__(list(inner.source_patterns), list(inner.target_patterns), inner.operations, inner.force_cpu)
        self.inner, self.quantizer = inner, quantizer

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self.inner, memo), self.quantizer)

    def rename_source_key(self, source_key):
        renamed, pattern = self.inner.rename_source_key(source_key)
        self._was_used |= pattern is not None
        return renamed, pattern

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        self.inner.collected_tensors, self.inner.layer_targets = self.collected_tensors, self.layer_targets
        return self.inner.convert(layer_name, model=model, config=config, loading_info=loading_info)

    def reverse_transform(self):
        return self.inner.reverse_transform()


class ConvertFloat(WrappedConverter):
    """Leaves packed tensors alone: a pattern for ``experts.down_proj`` finds ``experts.down_proj.qweight`` as well."""

    def rename_source_key(self, source_key):
        layer, _, leaf = source_key.rpartition(".")
        if leaf in PACKED_NAMES and self.quantizer.owns(layer):
            return source_key, None
        return super().rename_source_key(source_key)


class QuantizeConverted(WrappedConverter):
    """Quantises what a converter of the model makes for quantised layers (fused projections, stacked experts)."""

    def rename_source_key(self, source_key):
        renamed, pattern = super().rename_source_key(source_key)
        if pattern is not None:
            layer = renamed.removesuffix(".weight")
            if self.quantizer.owns(layer):
                renamed = f"{layer}.qweight"
        return renamed, pattern

    def targets(self, renamed: str) -> list[str]:
        """All the names that a key renamed to the first of them stands for."""
        first = self.inner.target_patterns[0]
        return [renamed.replace(first, other) for other in self.inner.target_patterns]

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        name = self.quantizer.float_name(layer_name)
        made = super().convert(name, model=FloatShapes(model), config=config, loading_info=loading_info)
        result = {}
        for name in list(made):
            tensor = made.pop(name)
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            layer = name.removesuffix(".weight")
            if layer in self.quantizer.names:
                result.update(quantize_weight(model, layer, tensor, self.quantizer))
            else:
                result[name] = tensor
        return result


class FloatShapes:
    """The model for operations that look at a parameter's shape: for experts that of the float weight, on meta."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        packed = self.model.get_submodule(owner)._modules.get(leaf)
        if isinstance(packed, QuantizedExperts):
            return torch.empty(packed.weight_shape, device="meta")
        return self.model.get_parameter(name)


class ReadBitsandbytes(Converter):
    """The tensors that bitsandbytes stores for a layer, gathered and renamed; the bytes stay."""

    sources = BNB_KEYS

    def __init__(self, quantizer):
        super().__init__(quantizer)
        self.layout: str | None = None  # weight_format as bitsandbytes 0.39 to 0.43.0 pickled it

    def see(self, tensor) -> None:
        """Told of each value before Transformers starts to read it; it cannot read a string."""
        if isinstance(tensor, str):
            self.layout = tensor

    def rename_source_key(self, source_key):
        for pattern in BNB_KEYS:
            if source_key.endswith(f".{pattern}"):
                module = source_key[: -len(pattern) - 1]
                if not self.quantizer.owns(module):
                    break
                self._was_used = True
                return f"{module}.qweight", pattern
        return source_key, None

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        name = layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if self.layout is not None:
            self.collected_tensors.pop("weight_format", None)
        parts, shape = self.one_of_each(), layer.weight_shape
        if self.layout is not None:
            parts["weight_format"] = self.layout
        if not hasattr(layer, "quant_type"):
            return packed_parameters(layer, name, native_from_bnb8(parts, name, shape)[0])
        notes: list[str] = []
        tensors, settings = native_from_bnb4(parts, name, shape, notes)
        for key, wanted in layer.format().items():  # of pickled files only the first layer was looked at
            if settings.get(key, wanted) != wanted:
                raise ValueError(
                    f"{name}: the checkpoint has {key}={settings[key]!r}, its first layer (or its config) "
                    f"{key}={wanted!r}; save the checkpoint as safetensors, from which layers that differ can be read"
                )
        for note in notes:
            self.quantizer.notes.setdefault(note, []).append(name)
        return packed_parameters(layer, name, tensors)

    def reverse_transform(self):
        return WriteBitsandbytes(self.quantizer)


class WriteBitsandbytes(Converter):
    """A layer's tensors under bitsandbytes' names, for files that bitsandbytes can load."""

    sources, target = PACKED_NAMES, "weight"

    def rename_source_key(self, source_key):
        module, _, leaf = source_key.rpartition(".")
        if leaf not in PACKED_NAMES:
            return source_key, None
        self._was_used = True
        return f"{module}.weight", leaf

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        name = layer_name.rpartition(".")[0]
        layer, tensors = model.get_submodule(name), self.one_of_each()
        if "qweight" not in tensors:
            return {}  # an offloaded model is saved shard by shard: the shard with qweight writes the layer
        for leaf, parameter in layer.named_parameters(recurse=False):
            if leaf in PACKED_NAMES and leaf not in tensors:
                tensors[leaf] = stored(model, f"{name}.{leaf}", parameter)
        parts = bnb_from_native(
            tensors, layer.format(), shape=layer.weight_shape, dtype=layer.weight_dtype, layer=name
        )
        return {f"{name}.{key}": tensor for key, tensor in parts.items()}

    def reverse_transform(self):
        return ReadBitsandbytes(self.quantizer)


# ------------------------------------------------------------------ pieces


def stored(model, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's data, fetched from memory or disk if it is offloaded."""
    if parameter.device.type != "meta":
        return parameter
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def quantize_weight(model, name: str, dense: torch.Tensor, quantizer) -> dict:
    """Packed parameters, by full name, for the dense weight of the layer ``name``; transposed first for a Conv1D.
    With them comes what the layers that share the weight need: the further Parameters of embeddings, and a copy of
    their own where they are offloaded to disk, since Transformers ties what is in memory."""
    layer = model.get_submodule(name)
    if isinstance(layer, QuantizedExperts):
        try:
            layer._check_dense(dense)
            return packed_parameters(layer, name, layer.packed(dense))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    if not dense.is_floating_point():
        raise TypeError(
            f"{name}.weight is {describe(dense)}; wanted a float tensor. Is the checkpoint quantised in another way?"
        )
    wanted = layer.weight_shape
    if getattr(layer, "source_cls", None) is not None and layer.source_cls.__name__ == "Conv1D":
        dense, wanted_in_file = dense.t().contiguous(), wanted[::-1]
    else:
        wanted_in_file = wanted
    if tuple(dense.shape) != wanted:
        raise ValueError(
            f"{name}.weight has shape {list(dense.shape if wanted == wanted_in_file else dense.t().shape)} in the "
            f"checkpoint; the layer wants {list(wanted_in_file)}"
        )
    if dense.dtype == torch.float64:
        dense = dense.float()
    try:
        tensors = layer._pack(dense)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None
    result = packed_parameters(layer, name, tensors)
    for other in quantizer.sharing(name):
        sharer = model.get_submodule(other)
        if LIKE in sharer._parameters:
            like = dense.new_zeros(1, dtype=layer.weight_dtype)
            result[f"{other}.{LIKE}"] = torch.nn.Parameter(like, requires_grad=False)
        if quantizer.is_on_disk(other):
            result |= packed_parameters(sharer, other, tensors)
    return result


def packed_parameters(layer, name: str, tensors: dict) -> dict:
    """Tensors -> frozen Parameters by full name, after comparing them with the (meta) parameters of ``layer``."""
    wanted = {leaf: parameter for leaf, parameter in layer.named_parameters(recurse=False) if leaf in PACKED_NAMES}
    if set(wanted) != set(tensors):
        raise ValueError(f"{name}: got {', '.join(sorted(tensors))}; the layer has {', '.join(sorted(wanted))}")
    result = {}
    for leaf, tensor in tensors.items():
        if tensor.numel() != wanted[leaf].numel() or tensor.dtype != wanted[leaf].dtype:
            raise ValueError(f"{name}.{leaf} is {describe(tensor)}; the layer wants {describe(wanted[leaf])}")
        result[f"{name}.{leaf}"] = torch.nn.Parameter(tensor.view(wanted[leaf].shape), requires_grad=False)
    return result


def reverts(entry, names) -> bool:
    """Would saving run one of these parameters through the reverse of this conversion? A mere new name is fine, unless
    it reads like one of bitsandbytes' (``weight.absmax``)."""
    try:
        reverse = entry.reverse_transform()
    except NotImplementedError:
        return False
    renamed = [reverse.rename_source_key(name) for name in names]
    if isinstance(entry, WeightConverter):
        return any(pattern is not None for _, pattern in renamed)
    return any(name.rpartition(".")[0].endswith(".weight") for name, _ in renamed)


def file_renaming(model, conversions):
    """Name of a float parameter in a file -> its name in ``model``, by Transformers' renamings and prefix rule."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    known = model.state_dict()

    def rename(key: str) -> str:
        used = [entry._was_used for entry in renamings]  # asking is not using: what was used is undone when saving
        name = rename_source_key(key, renamings, [], model.base_model_prefix, known)[0]
        for entry, before in zip(renamings, used, strict=True):
            entry._was_used = before
        return key if name not in known and key in known else name

    return rename
