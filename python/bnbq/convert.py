"""``bnbq convert SRC DST --to FORMAT``: a quantised checkpoint directory in another format, layer by layer.

Between bnbq's and bitsandbytes' files the packed bytes and the scales stay as they are; a float format gets what
``dequantize`` gives. What is quantised, and how, is read as from_pretrained reads it, with the model on the meta
device only. As with ``bnbq quantize`` the largest layer must fit into memory, and DST appears when all is written.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import checkpoint, checkpoint_bnb, shards, stream
from .config import BNB_QUANT_TYPES
from .errors import UserError
from .folders import check_places, copy_side_files, staging
from .state import LIKE

FLOAT_TARGETS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = ("bnbq", "bitsandbytes", *FLOAT_TARGETS)


@dataclass
class Layer:
    """A quantised layer: its tensors in the files (leaf -> Entry), and the layer on meta that they would fill."""

    name: str
    prefix: str  # its name in the files
    entries: dict
    native: bool
    module: torch.nn.Module


@dataclass
class Summary:
    """What `convert_checkpoint` did; sizes in bytes. ``notes`` is what was odd about the source."""

    path: Path
    came: str
    to: str
    layers: int
    bytes_before: int
    bytes_after: int
    shards: int
    notes: dict[str, list[str]] = field(default_factory=dict)  # note -> layers

    def text(self) -> str:
        """One line."""
        return (
            f"{self.path}: {self.layers} quantised layers from {self.came} to {self.to}, "
            f"{stream.megabytes(self.bytes_before)} -> {stream.megabytes(self.bytes_after)} MB in {self.shards} "
            f"file{'s' if self.shards != 1 else ''}"
        )


def convert_checkpoint(
    src, dst, to: str, *, max_shard_size: int = 5 * 10**9, force: bool = False, progress: bool | None = None
) -> Summary:
    """Write the quantised checkpoint directory ``src`` as a new directory ``dst`` in another format.

    Args:
        src: what bnbq (save_pretrained, ``bnbq quantize``) or bitsandbytes wrote.
        to: "bnbq", "bitsandbytes", or for a float checkpoint "bf16", "fp16" or "fp32". The source's own format is
            fine: it is written afresh, whole in place of what old versions left out or spoilt.
        dst, max_shard_size, force, progress: as for `stream.quantize_checkpoint`.

    Float tensors of the model's dtype become that of a float target; those that are kept in another stay.
    Raises UserError for anything wrong with the arguments or files, and naming the first tensor that bitsandbytes
    has no format for (int4, int8 in blocks, experts, embeddings, side branches); ``dst`` is then as it was.
    """
    if to not in TARGETS:
        raise UserError(f"to: got {to!r}, expected one of {', '.join(TARGETS)}")
    src, dst = Path(src), Path(dst)
    check_places(src, dst, force)
    source_config, settings = read_config(src)
    came = "bitsandbytes" if "bitsandbytes" in (settings["quant_method"], settings.get("checkpoint_format")) else "bnbq"
    source = shards.Source(src)
    model, dtype = stream.meta_model(src, source_config, source)
    quantizer, kept = read_layers(src, model, settings, source)
    config = type(quantizer.quantization_config).from_dict(
        {**quantizer.quantization_config.to_native_dict(), "checkpoint_format": "bnbq"}
    )
    conversion = Conversion(source, quantizer.stored.checksums, to, dtype)
    jobs = conversion.plan(model, quantizer)
    groups = stream.split(jobs, max_shard_size)
    stream.check_room(dst, jobs)
    if to == "bitsandbytes":
        config.checkpoint_format = to
    elif to == "bnbq":
        check_format(model, config)
    with staging(dst, force) as folder:
        copy_side_files(src, folder)
        if to in FLOAT_TARGETS:
            write_float_config(folder, source_config, FLOAT_TARGETS[to])
        else:
            stream.write_config(folder, source_config, config, dtype, kept)
        metadata = {"format": "pt"} if to in FLOAT_TARGETS else stream.metadata(config)
        written = stream.write_shards(folder, groups, conversion.convert, metadata, progress, "converting")
        if to == "bnbq":
            checkpoint.write_model_card(folder)
        else:
            checkpoint.remove_model_card(folder)
    return Summary(
        dst, came, to, len(conversion.layers), sum(j.nbytes for j in jobs), written, len(groups), conversion.notes
    )


# ------------------------------------------------------------------ config.json


def read_config(src: Path) -> tuple[dict, dict]:
    """(config.json without its quantization_config, that)."""
    config = stream.read_json(src)
    for owner in (config, config.get("text_config")):
        settings = owner.pop("quantization_config", None) if isinstance(owner, dict) else None
        if not settings:
            continue
        method = settings.setdefault("quant_method", "bitsandbytes") if isinstance(settings, dict) else settings
        if method not in ("bnbq", "bitsandbytes"):
            raise UserError(f"{src}: quantised by {method}; bnbq's and bitsandbytes' checkpoints are converted")
        return config, settings
    raise UserError(f"{src}: not quantised (config.json has no quantization_config); `bnbq quantize` does that")


def write_float_config(folder: Path, config: dict, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name}
    for part in [value for value in config.values() if isinstance(value, dict)]:  # the parts of a multimodal model
        part.update((key, name) for key in ("dtype", "torch_dtype") if part.get(key))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ what is there


def read_layers(src: Path, model, settings: dict, source: shards.Source):
    """(the quantiser that has put unfilled quantised layers into ``model``, names of the linear layers left)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from .integrations.transformers import BnbqConfig, BnbqQuantizer
    from .selection import is_linear

    linears = {name for name, module in model.named_modules() if is_linear(module)}
    try:
        quantizer = BnbqQuantizer(BnbqConfig.from_dict(settings), pre_quantized=True)
        files = [str(source.folder / file) for file in source.files]
        quantizer._process_model_before_weight_loading(model, checkpoint_files=files)
        quantizer.plan_from_files(model, get_model_conversion_mapping(model))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UserError(f"{src}: {error}") from error
    return quantizer, sorted(linears - quantizer.names)


def check_format(model, config) -> None:
    from .integrations.transformers import check_one_format

    try:
        check_one_format(model, config)
    except ValueError as error:
        raise UserError(str(error)) from error


def no_place(module) -> str | None:
    """What a layer is that bitsandbytes has no format for; None if it has."""
    from . import experts, nn
    from .side_branch import SideBranch

    if isinstance(module, experts.QuantizedExperts):
        return "the weight of experts, which bitsandbytes leaves in float"
    if isinstance(module, nn.QuantizedEmbedding):
        return "an embedding, which bitsandbytes leaves in float"
    if isinstance(module, SideBranch):
        return "of a layer with a side branch, for which bitsandbytes has no place"
    if getattr(module, "quant_type", None) not in (None, *BNB_QUANT_TYPES):
        return f"{module.quant_type}; bitsandbytes has {' and '.join(BNB_QUANT_TYPES)}"
    if not hasattr(module, "quant_type") and module.blocksize:
        return f"int8 with blocks of {module.blocksize}; bitsandbytes has one scale per row"
    return None


# ------------------------------------------------------------------ work


class Conversion:
    """How each tensor of ``source`` gets into format ``to``; ``dtype`` is the model's."""

    def __init__(self, source: shards.Source, checksums: dict, to: str, dtype: torch.dtype):
        self.source, self.checksums, self.to, self.dtype = source, checksums, to, dtype
        self.float_dtype = FLOAT_TARGETS.get(to)
        self.layers: dict[str, Layer] = {}
        self.notes: dict[str, list[str]] = {}

    def plan(self, model, quantizer) -> list[stream.Job]:
        """Jobs in the files' order: a quantised layer's is where its first tensor is."""
        owners, likes = {}, set()
        for name, stored in quantizer.stored.layers.items():
            if not stored.quantized:
                continue
            leaf = max(stored.entries, key=("weight", "qweight").__contains__)  # for messages rather than a scale
            entry = stored.entries[leaf]
            if name not in quantizer.names:
                raise UserError(f"{entry.file}: {entry.name} is of a quantised layer that the model does not have")
            layer = Layer(
                name, entry.name.removesuffix(f".{leaf}"), stored.entries, stored.native, model.get_submodule(name)
            )
            if self.to == "bitsandbytes" and (why := no_place(layer.module)):
                raise UserError(f"{entry.file}: {entry.name} is {why}")
            self.layers[name] = layer
            owners.update({entry.name: layer for entry in stored.entries.values()})
            likes.add(f"{layer.prefix}.{LIKE}")
        jobs, planned = [], set()
        for key, file in self.source.locate().items():
            layer = owners.get(key)
            if layer is None:
                if self.float_dtype is None or key not in likes:
                    nbytes = shards.tensor_bytes(self.source, key)
                    wide = self.float_dtype is not None and self.is_model_dtype(key)
                    size = torch.Size(self.source.shapes[key]).numel() * self.float_dtype.itemsize if wide else nbytes
                    jobs.append(stream.Job(key, file, nbytes, outputs=[key], size=size))
            elif layer.name not in planned:
                planned.add(layer.name)
                jobs.append(self.layer_job(key, file, layer))
        return jobs

    def is_model_dtype(self, key: str) -> bool:
        return stream.FLOAT_NAMES.get(self.source.dtypes[key]) == self.dtype

    def layer_job(self, key: str, file: str, layer: Layer) -> stream.Job:
        from .experts import QuantizedExperts

        nbytes = sum(shards.tensor_bytes(self.source, entry.name) for entry in layer.entries.values())
        job = stream.Job(key, file, nbytes, layer.prefix, layer.name, size=nbytes)
        native = list(layer.module.packed_spec())
        if self.float_dtype is not None:
            weight = torch.Size(layer.module.weight_shape)
            job.outputs = [layer.prefix if isinstance(layer.module, QuantizedExperts) else f"{layer.prefix}.weight"]
            job.size = weight.numel() * self.float_dtype.itemsize
            return job
        job.checksums = [f"{checkpoint.CRC_PREFIX}{layer.prefix}.{leaf}" for leaf in native]
        if self.to == "bnbq":
            branch = [leaf for leaf in layer.entries if layer.native and leaf not in native]
            job.outputs = [f"{layer.prefix}.{leaf}" for leaf in (*native, *branch)]
        else:
            job.outputs = [f"{layer.prefix}.{leaf}" for leaf in checkpoint_bnb.bnb_names(layer.module.format())]
            job.size += checkpoint_bnb.SMALL_BYTES
        return job

    def convert(self, job: stream.Job) -> tuple[dict, tuple]:
        """(what is written, by name in the file; the packed tensors, for checksums)."""
        if job.module is None:
            tensor = self.source.tensor(job.file, job.key)
            if self.float_dtype is not None and self.is_model_dtype(job.key):
                tensor = self.cast(tensor, job.key)
            return {job.key: tensor}, ()
        layer = self.layers[job.module]
        try:
            tensors, dtype = self.read(layer)
        except ValueError as error:
            raise UserError(f"{self.source.folder / job.file}: {error}") from error
        packed = {leaf: tensors[leaf] for leaf in layer.module.packed_spec()}
        if self.float_dtype is not None:
            return {job.outputs[0]: self.dense(layer, tensors)}, ()
        if self.to == "bitsandbytes":
            tensors = checkpoint_bnb.bnb_from_native(
                packed, layer.module.format(), shape=layer.module.weight_shape, dtype=dtype, layer=layer.name
            )
        return {f"{layer.prefix}.{leaf}": value for leaf, value in tensors.items()}, tuple(packed.values())

    def read(self, layer: Layer) -> tuple[dict, torch.dtype]:
        """The layer's tensors by bnbq's names, compared with their checksums, and the dtype that its weight had."""
        from .integrations.conversions import packed_parameters

        tensors = {
            leaf: self.source.tensor(Path(entry.file).name, entry.name) for leaf, entry in layer.entries.items()
        }
        dtype = self.dtype
        if not layer.native:
            shape, notes = layer.module.weight_shape, []
            if "SCB" in tensors:
                tensors, _ = checkpoint_bnb.native_from_bnb8(tensors, layer.name, shape)
            else:
                tensors, settings = checkpoint_bnb.native_from_bnb4(tensors, layer.name, shape, notes)
                dtype = settings["dtype"] or dtype
            for note in notes:
                self.notes.setdefault(note, []).append(layer.name)
            named = packed_parameters(layer.module, layer.name, tensors)
            tensors = {leaf: named[f"{layer.name}.{leaf}"] for leaf in tensors}
        full = {f"{layer.name}.{leaf}": tensor for leaf, tensor in tensors.items()}
        checkpoint.verify_checksums(full, self.checksums, self.source.folder)
        return tensors, dtype

    def dense(self, layer: Layer, tensors: dict) -> torch.Tensor:
        """The weight as the float model stores it."""
        layer.module.load_state_dict(tensors, strict=False, assign=True)
        weight = layer.module.dequantize(self.float_dtype)
        layer.module.to("meta")  # the next layer needs the memory
        transposed = getattr(getattr(layer.module, "source_cls", None), "__name__", None) == "Conv1D"
        return self.check_cast(weight.t() if transposed else weight, layer.prefix)

    def cast(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        return self.check_cast(tensor.to(self.float_dtype), key)

    def check_cast(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        """UserError for an infinity, which only fp16 makes of a finite number; the sum in fp32 has it, or is finite."""
        if tensor.dtype == torch.float16 and not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            raise UserError(f"{self.source.folder}: {key} has values that {self.float_dtype} cannot hold; take another")
        return tensor


def main(arguments) -> int:
    """Run ``bnbq convert``; ``arguments`` as cli.py parses them."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    summary = convert_checkpoint(
        arguments.src,
        arguments.dst,
        arguments.to,
        max_shard_size=arguments.max_shard_size,
        force=arguments.force,
    )
    for note, layers in summary.notes.items():
        print(f"bnbq convert: {layers[0]}, {len(layers)} layers in all: {note}", file=sys.stderr)
    print(summary.text())
    return 0
