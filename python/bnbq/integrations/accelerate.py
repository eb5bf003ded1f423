"""Accelerate: load a float checkpoint into any nn.Module, quantising tensor by tensor, and dispatch it.

`load_and_quantize` takes the arguments of ``accelerate.utils.load_and_quantize_model``. Differences: no GPU is
needed, and what "cpu" and "disk" hold is quantised too. Accelerate's hooks move the packed tensors as they move
any parameters.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import _bnbq, placement, replace, selection
from ..checkpoint import PACKED_NAMES, opened
from ..checkpoint_bnb import describe
from ..nn import QuantizedEmbedding, is_conv1d
from ..packed import PackedModule
from ..side_branch import PARTS, attach_empty
from ..state import LIKE
from .names import Names
from .stored import NATIVE

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


def load_and_quantize(
    model: torch.nn.Module,
    config=None,
    weights_location=None,
    device_map=None,
    no_split_module_classes=None,
    max_memory: dict | None = None,
    offload_folder=None,
    offload_state_dict: bool = False,
):
    """Quantise ``model``, loading its weights from ``weights_location`` if it is on the meta device.

    Args:
        model: built under ``accelerate.init_empty_weights()``, or with its weights in memory.
        config: BnbqConfig, BitsAndBytesConfig or None (nf4).
        weights_location: a safetensors (or .bin) file, an index.json, or a directory with either. Holds float
            weights, or what a bnbq layer's ``state_dict`` has. What Transformers renames, stacks (experts that a file
            has one by one), splits or joins when it loads a model is so here. Not needed for a model in memory.
        device_map: None is the CPU, or the current GPU if there is one; a strategy ("auto" ...), or devices by
            module name.
        no_split_module_classes, max_memory: for a strategy, as in Accelerate.
        offload_folder: where the tensors of "disk" go.
        offload_state_dict: accepted, without effect: one tensor is in memory at a time.

    Returns the model. Never holds more than the packed model and two tensors, or of one weight that is stacked three
    times its size. Raises ValueError that names the tensor for a weight that is missing, misshapen or not finite; the
    model is not usable after that.
    """
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if not on_meta:
        replace.quantize_model(
            model,
            config,
            device_map=default_device_map(device_map),
            max_memory=max_memory,
            offload_folder=offload_folder,
        )
        return model
    if weights_location is None:
        raise ValueError(
            f"load_and_quantize: {on_meta[0]} is on the meta device and there is no weights_location to load it from"
        )
    config = selection.resolve_config(config)
    with ExitStack() as opening:
        names = Names(model)
        parts = parts_by_name(names, checkpoint_files(Path(weights_location)), opening)
        transposed, aliases = swap_layers(model, config, *stored_packed(parts))
        device_map = default_device_map(device_map)
        if isinstance(device_map, str) and device_map in placement.STRATEGIES:
            if no_split_module_classes is not None:
                model._no_split_modules = list(no_split_module_classes)
            device_map = placement.plan(model, device_map, max_memory)
        elif not isinstance(device_map, dict):
            device_map = {"": device_map}
        placement.check_device_map(model, device_map, offload_folder)
        device_map = placement.flatten(model, device_map)
        offloaded = Offload(model, offload_folder if "disk" in device_map.values() else None)
        Loader(names, device_map, transposed, aliases, offloaded).load(parts, weights_location)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    replace.mark(model, config)
    return dispatch(model, device_map, offloaded)


def dispatch(model, device_map: dict, offloaded=None):
    """Place a loaded model by ``device_map``: a hook per module where there is more than one device, or the disk."""
    devices = {name: placement.as_device(device) for name, device in device_map.items()}
    model.hf_device_map = dict(device_map)
    if len(set(devices.values())) == 1 and "disk" not in devices.values():
        return model.to(next(iter(devices.values())))
    devices = {name: placement.accelerate_name(device) for name, device in devices.items()}
    on_cpu = {"cpu", "disk"} & set(devices.values())
    return placement.import_accelerate().dispatch_model(
        model, devices, main_device="cpu" if on_cpu else None, offload_dir=offloaded.folder if offloaded else None
    )


def default_device_map(device_map):
    if device_map is None:
        gpu = torch.cuda.is_available() and bool(_bnbq.build_info().get("cuda"))
        return {"": torch.cuda.current_device()} if gpu else {"": "cpu"}
    return device_map


# ------------------------------------------------------------------ the model


def swap_layers(model, config, packed: set, branches: dict) -> tuple[dict, dict]:
    """Replace the layers by unfilled quantised ones.

    Returns (name -> must the float weight be transposed first, name of a Parameter -> all that are tied to it).
    """
    transposed, aliases = {}, {}
    chosen = selection.select_modules(model, config)
    tied = selection.tied_names(model, chosen)
    stored = {tied.get(name, name) for name in packed}
    for name, module in chosen.items():
        if packed and tied.get(name, name) not in stored:
            continue
        layer = replace.make_layer(module, config, device="meta")
        layer.source_cls = type(module)
        if name in branches:
            attach_empty(layer, *branches[name])
        transposed[name] = isinstance(module, torch.nn.Module) and is_conv1d(module)
        replace.put(model, name, layer)
    for name, source in tied.items():
        if name not in transposed:
            continue
        for leaf in model.get_submodule(name).tied_parameters(model.get_submodule(source)):
            group = aliases.setdefault(f"{source}.{leaf}", [f"{source}.{leaf}"])
            group.append(f"{name}.{leaf}")
            aliases[f"{name}.{leaf}"] = group
    if hasattr(model, "all_tied_weights_keys"):
        from .ties import name_ties

        name_ties(model)
    return transposed, aliases


class Offload:
    """The tensors on disk, in the form that Accelerate reads: a folder of their own, which goes when the model does.

    (Accelerate takes an index.json that it finds for its own: two models cannot share a folder.)
    """

    def __init__(self, model, folder):
        self.folder, self.index = None, {}
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            self.folder = tempfile.mkdtemp(prefix="bnbq-", dir=folder)
            weakref.finalize(model, shutil.rmtree, self.folder, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        from accelerate.utils import offload_weight

        self.index = offload_weight(tensor.detach(), name, self.folder, index=self.index)

    def finish(self) -> None:
        if self.index:
            from accelerate.utils import save_offload_index

            save_offload_index(self.index, self.folder)


class Loader:
    """Puts what becomes of the tensors of the files where it belongs."""

    def __init__(self, names: Names, device_map: dict, transposed: dict, aliases: dict, offloaded: Offload):
        self.names, self.model = names, names.model
        self.transposed, self.aliases, self.offloaded = transposed, aliases, offloaded
        self.device_map = device_map
        self.wanted = dict(self.model.state_dict())
        self.done = set()

    def load(self, parts: dict, where) -> None:
        """``parts`` is from `parts_by_name`, ``where`` for messages."""
        unexpected = []
        for name, tensors in parts.items():
            if name not in self.wanted and self.layer(name) not in self.transposed:
                unexpected += [key for key, *_ in tensors]
                continue
            for made, tensor in self.convert(name, tensors).items():
                if self.layer(made) in self.transposed:
                    self.put_packed(made, tensor.to(self.device(made, loading=True)))
                elif made in self.wanted:
                    self.put(made, tensor)
                else:
                    unexpected.append(made)
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedEmbedding) and f"{name}.{LIKE}" not in self.done:
                self.store(f"{name}.{LIKE}", torch.zeros(1, dtype=module.weight_dtype))
        missing = sorted(set(self.wanted) - self.done - self.tied())
        if missing:
            raise ValueError(
                f"load_and_quantize: {len(missing)} tensors are not in {where}: {', '.join(missing[:8])}"
            )
        if unexpected:
            warnings.warn(
                f"load_and_quantize: {len(unexpected)} tensors of the checkpoint are not the model's: "
                f"{', '.join(unexpected[:8])}",
                stacklevel=3,
            )
        self.offloaded.finish()

    def tied(self) -> set:
        """Names that a model fills itself from others, once those are loaded."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return (
            {name for name, source in tied.items() if source in self.done}
            if hasattr(self.model, "tie_weights")
            else set()
        )

    def device(self, name: str, loading: bool = False):
        """Where a tensor goes: the entry of the device map with the longest matching prefix."""
        parts = name.split(".")
        for length in range(len(parts), -1, -1):
            key = ".".join(parts[:length])
            if key in self.device_map:
                device = placement.as_device(self.device_map[key])
                return torch.device("cpu") if loading and device == "disk" else device
        raise ValueError(f"load_and_quantize: device_map says nothing about {name}")

    def layer(self, name: str) -> str:
        """The quantised layer that this float parameter would be of. Experts are a parameter of their own name."""
        return name if name in self.transposed else name.removesuffix(".weight")

    def convert(self, name: str, tensors: list) -> dict[str, torch.Tensor]:
        try:
            return self.names.convert(name, tensors)
        except (ValueError, TypeError, RuntimeError) as error:
            others = f" and {len(tensors) - 1} others" if len(tensors) > 1 else ""
            raise ValueError(f"load_and_quantize: {name}, made of {tensors[0][0]}{others}: {error}") from error

    def put_packed(self, name: str, dense: torch.Tensor) -> None:
        module = self.layer(name)
        layer = self.model.get_submodule(module)
        dense = dense.t().contiguous() if self.transposed[module] else dense
        try:
            layer._check_dense(dense)
            tensors = layer.packed(dense)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
        for leaf, tensor in tensors.items():
            self.store(f"{module}.{leaf}", tensor)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        wanted = self.wanted[name]
        packed = name.rpartition(".")[2] in PACKED_NAMES and isinstance(
            self.model.get_submodule(name.rpartition(".")[0]), PackedModule
        )
        if tensor.shape != wanted.shape or (packed and tensor.dtype != wanted.dtype):
            raise ValueError(f"load_and_quantize: {name} is {describe(tensor)}; wanted {describe(wanted)}")
        self.store(name, tensor)

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor under its name and those of what is tied to it: one Parameter for all on a device."""
        placed = {}
        for alias in self.aliases.get(name, [name]):
            self.done.add(alias)
            parent, _, leaf = alias.rpartition(".")
            owner = self.model.get_submodule(parent)
            if self.device(alias) == "disk" and leaf in owner._parameters:
                self.offloaded.add(alias, tensor)
                continue
            device = self.device(alias, loading=True)
            if leaf in owner._parameters:
                frozen = not owner._parameters[leaf].requires_grad or not tensor.is_floating_point()
                if device not in placed:
                    placed[device] = torch.nn.Parameter(tensor.to(device), requires_grad=not frozen)
                owner._parameters[leaf] = placed[device]
            else:
                owner._buffers[leaf] = tensor.to(device)


# ------------------------------------------------------------------ the files


def checkpoint_files(location: Path) -> list[str]:
    """The files of a checkpoint: a file, those that an index lists, or those of a directory."""
    if location.is_dir():
        for name in (*INDEXES, *SINGLES):
            if (location / name).is_file():
                return checkpoint_files(location / name)
        raise FileNotFoundError(f"{location}: none of {', '.join((*SINGLES, *INDEXES))}")
    if not location.is_file():
        raise FileNotFoundError(f"{location}: no such file")
    if location.suffix != ".json":
        return [str(location)]
    try:
        names = sorted(set(json.loads(location.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{location}: not an index of shards ({type(error).__name__}: {error})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{location}: {name!r} is not the name of a file beside it")
        if not (location.parent / name).is_file():
            raise FileNotFoundError(f"{location.parent / name}: named in {location.name}, but not there")
    return [str(location.parent / name) for name in names]


def tensors_of(path: str, opening: ExitStack):
    """(name, function that reads the tensor, until ``opening`` closes) for every tensor of a file."""
    if path.endswith(".safetensors"):
        file = opening.enter_context(opened(path))
        for name in file.keys():  # noqa: SIM118 (the handle is no dict)
            yield name, lambda name=name: file.get_tensor(name)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, tensor in tensors.items():
            yield name, lambda tensor=tensor: tensor


def parts_by_name(names: Names, files: list[str], opening: ExitStack) -> dict[str, list]:
    """Name of a parameter, float or packed -> what `Names.convert` makes it of. What makes one may be in several files,
    and so all stay open."""
    packed = {f"{name.removesuffix('.weight')}.{leaf}" for name in names.known for leaf in (*NATIVE, LIKE)}
    known, parts = dict.fromkeys([*names.known, *packed], True), {}
    for path in files:
        for key, read in tensors_of(path, opening):
            name, pattern = names.find(key, known)
            parts.setdefault(name, []).append((key, None if name in packed else pattern, read))
    return parts


def stored_packed(parts: dict) -> tuple[set, dict]:
    """Names of layers that the files hold in packed form, and (rank, dtype) of the side branches that there are."""
    packed, branches, part = set(), {}, f".{PARTS[0]}"
    for name, tensors in parts.items():
        if name.endswith(".qweight"):
            packed.add(name.removesuffix(".qweight"))
        elif name.endswith(part):
            a = tensors[0][2]()
            branches[name.removesuffix(part)] = len(a), a.dtype
    return packed, branches
