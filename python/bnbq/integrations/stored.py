"""What the files of a checkpoint say about its quantised layers, read from the headers before anything is loaded.

For a quantised checkpoint the files decide which layers are quantised, not the skip rules: rules change, and
bitsandbytes' differ from ours. Everything that Transformers would only warn about (a missing scale means random
weights) or not see at all (scales of another layer) is an exception here that names the tensor and the file.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field

import torch

from ..checkpoint import PACKED_NAMES, SAFETENSORS_DTYPES, Entry, check_entry, opened, read_headers
from ..checkpoint_bnb import BNB4_KEYS, BNB8_KEYS, QUANT_STATE, bnb4_settings
from ..experts import ExpertWeight
from ..side_branch import PARTS, attach_empty

NATIVE = (*PACKED_NAMES, *PARTS)
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
BNB_SCALES = tuple(sorted({*BNB4_KEYS, *BNB8_KEYS} - {"weight"}, key=len, reverse=True))


@dataclass
class StoredLayer:
    """The tensors of one layer in the files: native or bitsandbytes' leaf name -> Entry."""

    name: str
    entries: dict = field(default_factory=dict)

    @property
    def native(self) -> bool:
        return any(leaf in PACKED_NAMES for leaf in self.entries)

    @property
    def bits(self) -> int | None:
        """Of a bitsandbytes layer; None if it is not one."""
        if "SCB" in self.entries or "weight_format" in self.entries:
            return 8
        return 4 if any(leaf.startswith("weight.") for leaf in self.entries) else None

    @property
    def quantized(self) -> bool:
        return self.native or self.bits is not None

    def attach_branch(self, layer) -> None:
        """Make ``layer`` one with a side branch if this one has it; `check_layer` compares the shapes later."""
        entry = self.entries.get(PARTS[0])
        if entry is not None:
            attach_empty(layer, entry.shape[0] if entry.shape else 0, DTYPES[entry.dtype])

    @property
    def files(self) -> str:
        return ", ".join(sorted({entry.file for entry in self.entries.values()}))


class StoredCheckpoint:
    """Headers of a model's safetensors files, by the names that the model gives to its layers.

    Args:
        files: paths.
        rename: name of a float parameter in the file -> name in the model.
    """

    def __init__(self, files, rename):
        self.files = [str(path) for path in files]
        self.entries, self.recorded = read_headers(self.files)
        self.layers: dict[str, StoredLayer] = {}
        self.floats: set[str] = set()  # by the model's names, or almost: those that are stacked are single still
        self.checksums: dict[str, str] = {}
        for key, entry in self.entries.items():
            module, leaf = split_key(key)
            if leaf is None or leaf == "weight":
                self.floats.add(rename(key))
            if leaf is None:
                continue
            name = rename(f"{module}.weight").removesuffix(".weight")
            self.layers.setdefault(name, StoredLayer(name)).entries[leaf] = entry
            if key in self.recorded and leaf in PACKED_NAMES:
                self.checksums[f"{name}.{leaf}"] = self.recorded[key]
        for key, value in self.recorded.items():
            # save_pretrained knows the model's names, not yet the file's: a checksum goes by either.
            self.checksums.setdefault(key, value)
        self.holes = {hole_pattern(name) for name, layer in self.layers.items() if layer.quantized}

    @property
    def where(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"

    def choose(self, candidates: dict, rules: set) -> dict:
        """Which of the model's layers are quantised: name -> StoredLayer.

        Args:
            candidates: every linear layer, embedding and expert weight of the model by name.
            rules: names of those that quantising this model afresh would choose.

        A layer that the files do not have at all is a hole if others like it are there (ValueError); otherwise it
        is new in this model (a pooler, a head) and left to Transformers, which reports it as missing.
        """
        chosen = {}
        for name, layer in self.layers.items():
            if not layer.quantized:
                continue
            if name in candidates:
                chosen[name] = layer
        for name in sorted(rules - set(chosen)):
            present = self.layers.get(name)
            if present is not None and "weight" in present.entries:
                if present.entries["weight"].dtype in ("U8", "I8"):
                    raise ValueError(
                        f"{present.files}: {name}.weight is {present.entries['weight']} without scales: the checkpoint "
                        "has no quantised layer by this name that can be read"
                    )
                continue
            if isinstance(candidates[name], ExpertWeight) and self.has_float_experts(name):
                continue
            if hole_pattern(name) in self.holes or f"{name}.qweight" in self.recorded:
                raise ValueError(
                    f"{self.where}: no tensors for {name}, which is quantised like its neighbours: "
                    "the checkpoint is incomplete"
                )
        if rules and not chosen:
            raise ValueError(
                f"{self.where}: the config says that the checkpoint is quantised, "
                "but no layer of the model is in these files"
            )
        return chosen

    def check_strangers(self, model) -> None:
        """Scales for what is no linear layer of the model are an error; names it does not have are not ours."""
        modules = dict(model.named_modules())
        for name, layer in self.layers.items():
            if (
                layer.quantized
                and name in modules
                and not hasattr(modules[name], "in_features")
                and type(modules[name]).__name__ != "Conv1D"
                and not (layer.native and isinstance(modules[name], torch.nn.Embedding))
            ):
                entry = next(e for leaf, e in layer.entries.items() if leaf != "weight")
                raise ValueError(
                    f"{entry.file}: {entry.name} belongs to a quantised layer, "
                    f"but {name} is a {type(modules[name]).__name__}"
                )

    def bnb_settings(self, names) -> dict:
        """Settings of bitsandbytes 4-bit layers, from the small tensors that describe them: name -> dict."""
        small = {}
        for name in names:
            entries = self.layers[name].entries
            small[name] = {
                leaf: entry
                for leaf, entry in entries.items()
                if leaf.startswith(QUANT_STATE) or leaf in ("weight.quant_map", "weight.nested_quant_map")
            }
        loaded = load_entries([entry for parts in small.values() for entry in parts.values()])
        result = {}
        for name, parts in small.items():
            tensors = {leaf: loaded[entry.name] for leaf, entry in parts.items()}
            if "weight.nested_absmax" in self.layers[name].entries:  # only its presence matters here
                tensors["weight.nested_absmax"] = None
            result[name] = bnb4_settings(tensors, f"{self.layers[name].files}: {name}")
        return result

    def check_layer(self, name: str, layer) -> None:
        """A layer's headers against the (meta) layer that will hold it: all there, none extra, dtype and shape."""
        entries = self.layers[name].entries
        if not self.layers[name].native:
            wanted = {"weight", "SCB"} if self.layers[name].bits == 8 else {"weight", "weight.absmax"}
            missing = sorted(wanted - set(entries))
            if missing:
                raise ValueError(
                    f"{self.layers[name].files}: {name} has {', '.join(sorted(entries))} but no {', '.join(missing)}"
                )
            return
        wanted = {leaf: parameter for leaf, parameter in layer.named_parameters() if leaf in NATIVE}
        for leaf in wanted:
            if leaf not in entries:
                raise ValueError(
                    f"{self.layers[name].files}: {name}.{leaf} is missing; {layer.describe()} needs {', '.join(wanted)}"
                )
            check_entry(entries[leaf], wanted[leaf], f"{name}.{leaf}")
        extra = sorted(set(entries) - set(wanted))
        if extra:
            raise ValueError(
                f"{entries[extra[0]].file}: {name}.{extra[0]} is unexpected; {layer.describe()} has {', '.join(wanted)}"
            )

    def has_float_experts(self, name: str) -> bool:
        """Do the files have this expert weight in float, whole or expert by expert?"""
        one = re.compile(rf"{re.escape(name.rpartition('.')[0])}\.\d+\.")
        return name in self.floats or any(one.match(other) for other in self.floats)


def split_key(key: str) -> tuple[str, str | None]:
    """``layer.weight.absmax`` -> ("layer", "weight.absmax"): the layer and the part of it that a key is, or None."""
    for leaf in (*BNB_SCALES, *PARTS):
        if key.endswith(f".{leaf}"):
            return key[: -len(leaf) - 1], leaf
    module, _, leaf = key.rpartition(".")
    return module, leaf if leaf == "weight" or leaf in PACKED_NAMES else None


def hole_pattern(name: str) -> str:
    """Layers that differ only in their numbers are alike."""
    return re.sub(r"\d+", "*", name)


def load_entries(entries: list[Entry]) -> dict[str, torch.Tensor]:
    """Tensors by their name in the file; every file is opened once."""
    by_file, loaded = {}, {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry.name)
    for path, names in by_file.items():
        with opened(path) as file:
            loaded.update({name: file.get_tensor(name) for name in names})
    return loaded


def pickled_settings(files) -> dict:
    """As `StoredCheckpoint.bnb_settings`, of the first 4-bit layer of bitsandbytes in pickled files, or {}. The
    weights stay on disk; files from before torch 1.6, whose weights would not, are not looked into."""
    from transformers.modeling_utils import load_state_dict

    for file in filter(zipfile.is_zipfile, files):
        tensors = load_state_dict(file)
        module = next((key.partition(f".{QUANT_STATE}")[0] for key in tensors if f".{QUANT_STATE}" in key), None)
        if module is not None:
            parts = {leaf: tensors[f"{module}.{leaf}"] for leaf in BNB4_KEYS if f"{module}.{leaf}" in tensors}
            return {module: bnb4_settings(parts, f"{file}: {module}")}
    return {}
