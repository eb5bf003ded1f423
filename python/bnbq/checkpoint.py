"""Checkpoints: safetensors files with checksums, and save / load for any nn.Module.

A saved directory holds ``model.safetensors`` (tensors by their state-dict names, and the CRC-32 of each in
the file's metadata) and ``bnbq.json`` (which layers are quantised, and how). Nothing is pickled. Files are
written under another name and then renamed, so an interrupted save leaves what was there before.

Files are untrusted: shapes, dtypes and settings are compared with the model before anything is used, and
bytes with their checksums after they are read. Transformers' save_pretrained and from_pretrained share the
header reading and the checksums (integrations/transformers.py); checkpoint_bnb.py has bitsandbytes' names.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint_bnb import float_dtype

VERSION = 1
WEIGHTS, SETTINGS = "model.safetensors", "bnbq.json"
CRC_PREFIX = "crc32:"
"""A safetensors file's metadata has ``crc32:<state-dict name>`` -> eight hex digits for every packed tensor."""
PACKED_NAMES = ("qweight", "absmax", "absmax2", "absmax_offset")
"""Parameter names of quantised layers."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
CARD_LINE = (
    "This model is quantised with bnbq. Install it and `import bnbq` before `from_pretrained`; "
    "without that, Transformers only warns and starts from random weights."
)
CARD_HEAD = "---\ntags:\n- bnbq\n---\n"
CARD_NOTE = f"\n## Loading\n\n{CARD_LINE}\n\n```python\nimport bnbq  # before from_pretrained\n```\n"


# ------------------------------------------------------------------ checksums


def crc32(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes in row-major order, as eight hex digits."""
    data = tensor.detach().contiguous().cpu().flatten()
    return f"{zlib.crc32(data.view(torch.uint8).numpy()) if data.numel() else 0:08x}"


def checksums(tensors: dict) -> dict:
    """Name -> CRC-32 for every tensor that has data (not on meta). zlib releases the GIL: two threads help."""
    names = [name for name, tensor in tensors.items() if tensor.device.type != "meta"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: crc32(tensors[name]), names), strict=True))


def verify_checksums(tensors: dict, recorded: dict, where) -> int:
    """Compare tensors in memory with the checksums of their file; returns how many were compared.

    Raises ValueError naming the first tensor that differs.
    """
    known = {name: tensor for name, tensor in tensors.items() if name in recorded}
    actual = checksums(known)
    for name, value in actual.items():
        if value != recorded[name]:
            raise ValueError(
                f"{where}: the bytes of {name} are not those that were saved "
                f"(CRC-32 {value}, recorded {recorded[name]}): the file is damaged or was edited"
            )
    return len(actual)


def checksum_metadata(tensors: dict) -> dict:
    """The entries that a safetensors file's metadata has for these tensors."""
    return {CRC_PREFIX + name: value for name, value in checksums(tensors).items()}


def recorded_checksums(metadata: dict | None) -> dict:
    """Name -> CRC-32 from a safetensors file's metadata; {} where a file has none."""
    return {
        key.removeprefix(CRC_PREFIX): value for key, value in (metadata or {}).items() if key.startswith(CRC_PREFIX)
    }


# ------------------------------------------------------------------ files


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, by its header: dtype is safetensors' name (``U8``, ``F32``)."""

    file: str
    name: str
    dtype: str
    shape: tuple

    def __str__(self):
        return f"{self.dtype} {list(self.shape)}"

    def load(self) -> torch.Tensor:
        with opened(self.file) as file:
            return file.get_tensor(self.name)


@contextmanager
def opened(path):
    """A safetensors file. A missing, truncated or foreign file is an error that names it."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; the checkpoint is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({os.path.getsize(path)} bytes): {error}") from None


def read_headers(files) -> tuple[dict, dict]:
    """Headers of safetensors files -> (name -> Entry, name -> recorded CRC-32).

    A name in two files is an error, as are files that record different checksums for a name.
    """
    entries, recorded, files = {}, {}, list(files)
    for path in files:
        with opened(path) as file:
            for name, value in recorded_checksums(file.metadata()).items():
                if recorded.setdefault(name, value) != value:
                    raise ValueError(
                        f"{path}: records another CRC-32 for {name} than {files[0]}: they are of different checkpoints"
                    )
            for name in file.keys():  # noqa: SIM118 (the handle is no dict)
                if name in entries:
                    raise ValueError(f"{name} is in {entries[name].file} and in {path}; which one is meant?")
                part = file.get_slice(name)
                entries[name] = Entry(str(path), name, part.get_dtype(), tuple(part.get_shape()))
    return entries, recorded


def write_atomically(path, write) -> None:
    """Call ``write(temporary path)``, flush it to disk and rename it to ``path``."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_safetensors(path, tensors: dict, metadata: dict | None = None) -> None:
    """Write a safetensors file with the checksums of all its tensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(metadata or {}), **checksum_metadata(tensors)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def write_model_card(directory) -> Path:
    """Make ``README.md`` of a saved model say that `import bnbq` comes first; an existing text is kept."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else CARD_HEAD
    if CARD_LINE not in text:
        write_atomically(
            path, lambda temporary: Path(temporary).write_text(text.rstrip("\n") + "\n" + CARD_NOTE, encoding="utf-8")
        )
    return path


def remove_model_card(directory) -> None:
    """Undo `write_model_card` for a model that is no longer in bnbq's format; what else a text says is kept."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text == CARD_HEAD + CARD_NOTE:
        path.unlink()
    elif CARD_NOTE in text:
        write_atomically(
            path, lambda temporary: Path(temporary).write_text(text.replace(CARD_NOTE, ""), encoding="utf-8")
        )


# ------------------------------------------------------------------ plain modules


OPTIONAL_STR = (str, type(None))
LINEAR = {
    "in_features": int,
    "out_features": int,
    "bias": bool,
    "weight_dtype": OPTIONAL_STR,
    "compute_dtype": OPTIONAL_STR,
    "blocksize": int,
}
EMBEDDING = {
    "num_embeddings": int,
    "embedding_dim": int,
    "padding_idx": (int, type(None)),
    "weight_dtype": OPTIONAL_STR,
    "blocksize": int,
}
EXPERTS = {**{key: kind for key, kind in LINEAR.items() if key != "bias"}, "num_experts": int, "transposed": bool}
FOUR_BIT = {"quant_type": str, "double_quant": bool}
LAYER_SETTINGS = {
    "Linear4bit": {**LINEAR, **FOUR_BIT},
    "Linear8bitLt": {**LINEAR, "threshold": (int, float)},
    "Embedding4bit": {**EMBEDDING, **FOUR_BIT},
    "Embedding8bit": EMBEDDING,
    "Experts4bit": {**EXPERTS, **FOUR_BIT},
    "Experts8bit": {**EXPERTS, "threshold": (int, float)},
}
"""Class -> what ``bnbq.json`` says of a layer of it, and of which kinds."""


def layer_settings(layer) -> dict:
    """What is needed to build a quantised layer again, as JSON: class, sizes, format."""
    from . import nn
    from .experts import QuantizedExperts
    from .side_branch import SideBranch

    if isinstance(layer, nn.QuantizedEmbedding):
        return {
            "class": "Embedding4bit" if hasattr(layer, "quant_type") else "Embedding8bit",
            "num_embeddings": layer.num_embeddings,
            "embedding_dim": layer.embedding_dim,
            "padding_idx": layer.padding_idx,
            "weight_dtype": dtype_name(layer.weight_dtype),
            **layer.format(),
        }
    experts = isinstance(layer, QuantizedExperts)
    settings = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        **(
            {"num_experts": layer.num_experts, "transposed": layer.transposed}
            if experts
            else {"bias": layer.bias is not None}
        ),
        "weight_dtype": dtype_name(layer.weight_dtype),
        "compute_dtype": dtype_name(layer.compute_dtype),
    }
    if isinstance(layer, SideBranch):
        branch = layer.side_branch.a
        settings |= {"side_rank": branch.shape[0], "side_dtype": dtype_name(branch.dtype)}
    if hasattr(layer, "quant_type"):
        if layer.activations is not None:
            settings["activations"] = layer.activations
        return {
            "class": "Experts4bit" if experts else "Linear4bit",
            **settings,
            "quant_type": layer.quant_type,
            "blocksize": layer.blocksize,
            "double_quant": layer.double_quant,
        }
    kind = "Experts8bit" if experts else "Linear8bitLt"
    return {"class": kind, **settings, "blocksize": layer.blocksize, "threshold": layer.threshold}


def layer_from_settings(settings: dict, where: str, device="meta"):
    """The layer that ``layer_settings`` describes, unfilled. The settings are checked: they come from a file."""
    from . import experts, nn
    from .side_branch import attach_empty

    named = settings.get("class") if isinstance(settings, dict) else None
    if not isinstance(named, str) or named not in LAYER_SETTINGS:
        raise ValueError(f"{where}: {settings!r} describes no layer of bnbq")
    settings, wanted = {key: value for key, value in settings.items() if key != "class"}, LAYER_SETTINGS[named]
    build = getattr(nn, named, None) or getattr(experts, named)
    if "quant_type" in wanted and "compute_dtype" in wanted and "activations" in settings:
        wanted = {**wanted, "activations": str}
    if "side_rank" in settings and "in_features" in wanted:
        wanted = {**wanted, "side_rank": int, "side_dtype": str}
    for key, kind in wanted.items():
        if key not in settings:
            raise ValueError(f"{where}: no {key!r} in its settings")
        if not isinstance(settings[key], kind) or (
            kind is int and (isinstance(settings[key], bool) or settings[key] < 0)
        ):
            raise ValueError(f"{where}: {key} is {settings[key]!r}")
    if set(settings) - set(wanted):
        raise ValueError(
            f"{where}: settings this version does not know: {', '.join(sorted(set(settings) - set(wanted)))}"
        )
    rank = settings.pop("side_rank", 0)
    for key in ("weight_dtype", "compute_dtype", "side_dtype"):
        if key in settings:
            settings[key] = float_dtype(settings[key], f"{where}: {key}", optional=key != "side_dtype")
    branch_dtype = settings.pop("side_dtype", None)
    try:
        layer = build(device=device, **settings)
        if rank:
            attach_empty(layer, rank, branch_dtype)
        return layer
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from None


def dtype_name(dtype) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def save(model: torch.nn.Module, directory) -> Path:
    """Write a module with quantised layers to ``directory/model.safetensors`` and ``bnbq.json``.

    Any nn.Module will do; Transformers models have ``save_pretrained``. Tensors that share memory (tied weights)
    are written once. Returns the directory.
    """
    from .packed import PackedModule, state_dict_to_save

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, first, tied = {}, {}, {}
    for name, tensor in state_dict_to_save(model).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} in the state dict is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: it has no data to save")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in first:
            tied[name] = first[key]
        else:
            first[key], tensors[name] = name, tensor
    layers = {
        name: layer_settings(module)
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
    }
    settings = {"format": "bnbq", "version": VERSION, "layers": layers, "tied": tied}
    text = json.dumps(settings, indent=1, sort_keys=True)
    # The same text goes into the weights' file: one that belongs to another bnbq.json is then noticed.
    write_safetensors(directory / WEIGHTS, tensors, {"bnbq": json.dumps(settings, sort_keys=True)})
    write_atomically(directory / SETTINGS, lambda path: Path(path).write_text(text + "\n", encoding="utf-8"))
    return directory


def load(model: torch.nn.Module, directory, device=None) -> torch.nn.Module:
    """Fill ``model`` from a directory written by ``save``, bit for bit.

    Args:
        model: the same architecture in float (the meta device is fine: nothing of it is kept) or quantised.
            Its linear layers are replaced by the quantised ones that the directory lists.
        device: where the tensors go; None is where the model's are, or the CPU for those on meta.

    Raises FileNotFoundError or ValueError that names the file, layer or tensor at fault.
    """
    directory = Path(directory)
    settings = read_settings(directory / SETTINGS)
    weights = directory / WEIGHTS
    entries, recorded = read_headers([weights])
    with opened(weights) as file:
        embedded = (file.metadata() or {}).get("bnbq")
    if embedded is not None and embedded != json.dumps(settings, sort_keys=True):
        raise ValueError(f"{directory}: {SETTINGS} and {WEIGHTS} are of different saves; was one interrupted?")
    devices = {name: tensor.device for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    for name, described in settings["layers"].items():
        layer = layer_from_settings(described, f"{directory / SETTINGS}: {name}")
        replace_layer(modules, name, layer, directory / SETTINGS)
    target = model.state_dict()
    check_entries(entries, {k: v for k, v in target.items() if k not in settings["tied"]}, weights)
    loaded = {}
    with opened(weights) as file:
        for name in entries:
            goes_to = device or next(
                (
                    d
                    for d in (devices.get(name), devices.get(name.rpartition(".")[0] + ".weight"))
                    if d is not None and d.type != "meta"
                ),
                "cpu",
            )
            tensor = file.get_tensor(name)
            verify_checksums({name: tensor}, recorded, weights)
            loaded[name] = tensor.to(goes_to)
    for name, source in settings["tied"].items():
        if source not in loaded:
            raise ValueError(f"{directory / SETTINGS}: {name} is tied to {source}, which is not in {WEIGHTS}")
        loaded[name] = loaded[source]
    model.load_state_dict(loaded, strict=True, assign=True)
    tie_again(model, settings["tied"])
    return model


def read_settings(path: Path) -> dict:
    """``bnbq.json``, checked as far as it can be without the model."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; was this directory written by bnbq.checkpoint.save?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict) or settings.get("format") != "bnbq":
        raise ValueError(f'{path}: not a bnbq checkpoint (no "format": "bnbq")')
    if settings.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {settings.get('version')!r}; this bnbq reads version {VERSION}. Upgrade bnbq"
        )
    if not isinstance(settings.get("layers"), dict) or not isinstance(settings.get("tied", {}), dict):
        raise ValueError(f'{path}: "layers" and "tied" must be objects')
    settings.setdefault("tied", {})
    return settings


def check_sizes(old, layer, name: str) -> None:
    """ValueError if a linear layer of the model has other sizes than the one that comes in its place."""
    sizes = getattr(old, "in_features", None), getattr(old, "out_features", None)
    if sizes == (None, None) and type(old).__name__ == "Conv1D":
        sizes = tuple(old.weight.shape)
    if sizes != (layer.in_features, layer.out_features):
        raise ValueError(
            f"{name} is {layer.in_features} -> {layer.out_features}; the model's is {sizes[0]} -> {sizes[1]}"
        )


def fitting_embedding(old, layer, name: str):
    """``layer``, or one like it with the forward of ``old``, the embedding of the model that it replaces."""
    sizes = tuple(old.weight.shape) if isinstance(old, torch.nn.Embedding) else None
    if sizes != layer.weight_shape:
        raise ValueError(
            f"{name} is an embedding of {list(layer.weight_shape)}; the model has "
            f"{f'one of {list(sizes)}' if sizes else f'a {type(old).__name__}'} there"
        )
    if getattr(old, "float_class", type(old)) is torch.nn.Embedding:
        return layer
    old = old.to_embedding() if hasattr(old, "to_embedding") else old
    return type(layer).from_embedding(old, "meta", weight_dtype=layer.weight_dtype, **layer.format())


def replace_layer(modules: dict, name: str, layer: torch.nn.Module, where) -> None:
    """Put ``layer`` where ``name`` is, if what is there has the same sizes."""
    from . import experts, nn

    if isinstance(layer, experts.QuantizedExperts):
        replace_experts(modules[""], name, layer, where)
        modules[name] = layer
        return
    parent, _, leaf = name.rpartition(".")
    old = modules.get(name)
    if old is None or parent not in modules:
        raise ValueError(f"{where}: the model has no layer {name!r}")
    if isinstance(layer, nn.QuantizedEmbedding):
        layer = fitting_embedding(old, layer, f"{where}: {name}")
    else:
        check_sizes(old, layer, f"{where}: {name}")
    layer.train(old.training)
    setattr(modules[parent], leaf, layer)
    modules[name] = layer


def replace_experts(model: torch.nn.Module, name: str, layer, where) -> None:
    """The same for experts, which are a Parameter in a float model."""
    from .experts import ExpertWeight, float_part
    from .replace import put

    try:
        old = float_part(model, name)
    except AttributeError:
        raise ValueError(f"{where}: the model has no expert weight {name!r}") from None
    shape = tuple(old.weight.shape) if isinstance(old, ExpertWeight) else getattr(old, "weight_shape", None)
    if shape != layer.weight_shape:
        raise ValueError(f"{where}: {name} is {list(layer.weight_shape)}; the model's is {shape and list(shape)}")
    put(model, name, layer)


def check_entries(entries: dict, target: dict, where) -> None:
    """A file's headers against the tensors that a model wants: same names, and for packed ones same dtype and shape."""
    missing, extra = sorted(set(target) - set(entries)), sorted(set(entries) - set(target))
    if missing or extra:
        raise ValueError(
            f"{where}: {'missing ' + ', '.join(missing[:8]) if missing else 'unexpected ' + ', '.join(extra[:8])}"
            f"{' ...' if max(len(missing), len(extra)) > 8 else ''}"
        )
    for name, entry in entries.items():
        check_entry(entry, target[name], name, packed=name.rpartition(".")[2] in PACKED_NAMES)


def check_entry(entry: Entry, wanted: torch.Tensor, name: str, packed: bool = True) -> None:
    """One tensor's header: the shape always, the dtype of packed tensors exactly (floats may be cast)."""
    if entry.shape != tuple(wanted.shape) or (packed and entry.dtype != SAFETENSORS_DTYPES.get(wanted.dtype)):
        raise ValueError(
            f"{entry.file}: {name} is {entry}; wanted {SAFETENSORS_DTYPES.get(wanted.dtype)} {list(wanted.shape)}"
        )


def tie_again(model: torch.nn.Module, tied: dict) -> None:
    """Make tied names one Parameter object again."""
    for name, source in tied.items():
        parent, _, leaf = name.rpartition(".")
        owner, _, source_leaf = source.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(source_leaf)
        if parameter is not None and leaf in model.get_submodule(parent)._parameters:
            model.get_submodule(parent)._parameters[leaf] = parameter
