"""``bnbq quantize SRC DST``: a checkpoint directory quantised tensor by tensor, the model never built.

The model exists on the meta device only, to decide which layers are quantised (the same rules as for
a model in memory). Then each tensor goes from the mapped source file through the core into the output
file, so the memory needed is that of the largest layer, whatever the size of the model. DST appears
by one rename when everything is written and synced; anything that fails before leaves no trace of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import checkpoint, checkpoint_bnb, experts, ops, shards
from .config import COMPUTE_DTYPES, BnbqConfig
from .errors import UserError
from .folders import check_places, copy_side_files, staging
from .integrations.names import Names
from .nn import is_conv1d
from .state import LIKE

FLOAT_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Job:
    """One tensor of the source, or those that are stacked to one expert weight. ``module`` is None for one that is
    copied; else the layer it becomes, under ``prefix`` (the name in the file, without ``.weight``)."""

    key: str
    file: str
    nbytes: int
    prefix: str = ""
    module: str | None = None
    shape: tuple[int, int] = (0, 0)  # (out_features, in_features)
    transposed: bool = False
    outputs: list[str] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)  # metadata keys, for native tensors under either format
    size: int = 0  # bytes to be written, near enough to cut shards
    stack: Stack | None = None  # of an expert weight


@dataclass
class Stack:
    """The tensors of an expert weight: (key, file, source pattern of the converter that stacks them) of each, and
    how that is done."""

    weight: experts.ExpertWeight
    names: Names
    parts: list[tuple[str, str, str | None]] = field(default_factory=list)


@dataclass
class Summary:
    """What `quantize_checkpoint` did; sizes in bytes."""

    path: Path
    quantized: int
    linears: int
    bytes_before: int
    bytes_after: int
    bytes_quantized: int
    shards: int
    kept: list[str]
    copied: dict[str, int]  # bytes of what was copied, by name with * for numbers
    embeddings: int = 0  # of those quantised
    experts: int = 0  # of those quantised

    def text(self) -> str:
        """One line: how much was quantised and what was not."""
        share = 100 * self.bytes_quantized / max(self.bytes_before, 1)
        kept = f"; kept: {', '.join(self.kept[:6])}{' ...' if len(self.kept) > 6 else ''}" if self.kept else ""
        large = [
            f"{name} ({megabytes(size)} MB)"
            for name, size in sorted(self.copied.items(), key=lambda item: -item[1])
            if size > 0.05 * self.bytes_before
        ]
        also = (" and expert weights" if self.experts else "") + (" and embeddings" if self.embeddings else "")
        return (
            f"{self.path}: {self.quantized} of {self.linears} linear layers{also}, {share:.1f} % of the bytes, "
            f"{megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)} MB in {self.shards} "
            f"file{'s' if self.shards != 1 else ''}{kept}{'; copied: ' + ', '.join(large[:4]) if large else ''}"
        )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def quantize_checkpoint(
    src,
    dst,
    config: BnbqConfig | None = None,
    *,
    max_shard_size: int = 5 * 10**9,
    force: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Quantise the checkpoint directory ``src`` into a new directory ``dst``.

    Args:
        src: a directory with config.json and safetensors (one file or shards with an index), not quantised.
        dst: must not exist or be empty, unless ``force`` and it holds a checkpoint: then it is replaced at the end.
        config: BnbqConfig; None is nf4.
        max_shard_size: bytes of tensors in one output file.
        progress: show a bar on stderr; None shows it on a terminal.

    The result loads with ``from_pretrained`` and holds the bytes that quantising while loading gives.
    Raises UserError for anything wrong with the arguments or files; ``dst`` is then as it was.
    """
    src, dst, config = Path(src), Path(dst), config or BnbqConfig()
    check_places(src, dst, force)
    source_config = read_json(src)
    check_float(src, source_config)
    source = shards.Source(src)
    model, dtype = meta_model(src, source_config, source)
    jobs, kept = plan(model, source, config)
    groups = split(jobs, max_shard_size)
    check_room(dst, jobs)
    with staging(dst, force) as folder:
        copy_side_files(src, folder)
        write_config(folder, source_config, config, dtype, kept)
        written = write_shards(
            folder, groups, lambda job: convert(job, source, config, dtype), metadata(config), progress, "quantising"
        )
        if config.checkpoint_format == "bnbq":
            checkpoint.write_model_card(folder)
    quantized = [job for job in jobs if job.module is not None]
    copied: dict[str, int] = {}
    for job in jobs:
        if job.module is None:
            copied[wildcards(job.key)] = copied.get(wildcards(job.key), 0) + job.nbytes
    return Summary(
        dst,
        len(quantized),
        len(quantized) + len(kept),
        sum(job.nbytes for job in jobs),
        written,
        sum(job.nbytes for job in quantized),
        len(groups),
        kept,
        copied,
        sum(f"{job.prefix}.{LIKE}" in job.outputs for job in quantized),
        sum(job.stack is not None for job in quantized),
    )


def check_room(dst: Path, jobs: list[Job]) -> None:
    room = shutil.disk_usage(dst.absolute().parent).free
    wanted = sum(job.size for job in jobs)
    if wanted > room:
        raise UserError(f"{dst}: needs {megabytes(wanted)} MB, the disk has {megabytes(room)} MB free")


# ------------------------------------------------------------------ config.json


def read_json(src: Path) -> dict:
    """config.json as it is."""
    path = src / "config.json"
    if not path.is_file():
        raise UserError(f"{src}: no config.json, so this is no checkpoint of a Transformers model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, an object is wanted")
    return config


def check_float(src: Path, config: dict) -> None:
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else "unknown method"
        raise UserError(f"{src}: already quantised ({method}); give the float checkpoint")


def write_config(folder: Path, source_config: dict, config: BnbqConfig, dtype: torch.dtype, kept: list[str]) -> None:
    name = str(dtype).removeprefix("torch.")
    settings = config.to_dict()
    if config.checkpoint_format == "bitsandbytes":
        settings["llm_int8_skip_modules"] = kept  # bitsandbytes drops its default skips once one is named: so name all
        if config.compute_dtype is None and name in COMPUTE_DTYPES:
            settings["bnb_4bit_compute_dtype"] = name  # there is no "the input's" there, and its default is float32
    result = dict(source_config, quantization_config=settings)
    if not result.get("dtype") and not result.get("torch_dtype"):
        result["dtype"] = name  # else it would be guessed from the first float tensor, which may be an fp32 scale
    (folder / "config.json").write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ plan


def meta_model(src: Path, source_config: dict, source: shards.Source):
    """The model without storage, and the dtype that from_pretrained would give it."""
    import transformers

    names = source_config.get("architectures") or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise UserError(
            f"{src / 'config.json'}: architectures is {names}, and Transformers {transformers.__version__} "
            "has no such class"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(src, local_files_only=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise UserError(f"{src / 'config.json'}: {error}") from error
    dtype = getattr(config, "dtype", None)
    if dtype is None:
        first = next(iter(source.files))
        floats = [source.dtypes[key] for key in sorted(source.files[first]) if source.dtypes[key] in FLOAT_NAMES]
        dtype = FLOAT_NAMES[floats[0]] if floats else torch.float32
    with torch.device("meta"):
        model = model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)
    return model, dtype


def plan(model, source: shards.Source, config: BnbqConfig):
    """(jobs in the files' order, names of the layers that stay float)."""
    from .selection import select, tied_names

    selection = select(model, config)
    selected, names, files = selection.modules, Names(model), source.locate()
    native = native_parts(config)
    after = {
        **{name: True for name in names.known if name.removesuffix(".weight") not in selected},
        **{f"{module}.{part}": True for module in selected for part in native},
    }
    jobs, found = [], {}
    for key, file in files.items():
        nbytes = shards.tensor_bytes(source, key)
        name, converted = names.find(key)
        module = name.removesuffix(".weight")
        if isinstance(selected.get(name), experts.ExpertWeight):
            if name not in found:
                found[name] = expert_job(name, key, file, selected[name], names, after, config)
                jobs.append(found[name])
            found[name].stack.parts.append((key, file, converted))
            found[name].nbytes += nbytes
            continue
        if not name.endswith(".weight") or module not in selected:
            jobs.append(Job(key, file, nbytes, outputs=[key], size=nbytes))
            continue
        if converted or module in found:
            raise UserError(
                f"{source.folder / file}: {key!r} and others are merged or split into {name!r} when loaded, which "
                "cannot be streamed; load the model with a quantization_config and save_pretrained it"
            )
        found[module] = key
        n, k, transposed = layer_shape(selected[module])
        if source.shapes[key] != ((k, n) if transposed else (n, k)):
            raise UserError(
                f"{source.folder / file}: {key!r} has shape {list(source.shapes[key])}, "
                f"the model wants {[k, n] if transposed else [n, k]}"
            )
        if source.dtypes[key] not in FLOAT_NAMES:
            raise UserError(
                f"{source.folder / file}: {key!r} has dtype {source.dtypes[key]}, "
                f"one of {', '.join(FLOAT_NAMES)} is wanted"
            )
        prefix = key.removesuffix(".weight")
        if names.find(f"{prefix}.qweight", after)[0] != f"{module}.qweight":
            prefix = module  # the file's name would not be recognised with another ending: use the model's
        jobs.append(
            Job(
                key,
                file,
                nbytes,
                prefix,
                module,
                (n, k),
                transposed,
                [f"{prefix}.{part}" for part in (*stored_parts(config), *float_parts(selected[module]))],
                [f"{checkpoint.CRC_PREFIX}{prefix}.{part}" for part in native],
                packed_size(n, k, config),
            )
        )
    tied = {name for pair in tied_names(model, selected).items() if found.keys() & {*pair} for name in pair}
    lost = sorted(selected.keys() - found.keys() - tied)
    if holes := [name for name in lost if wildcards(name) in set(map(wildcards, found))]:
        raise UserError(f"{source.folder}: has no weight for {', '.join(holes[:3])}{' ...' if len(holes) > 3 else ''}")
    # Experts never are in bitsandbytes' format; its list of what is skipped need not name them.
    kept = set(selection.kept) - (experts.find(model).keys() if config.checkpoint_format == "bitsandbytes" else set())
    return jobs, sorted([*kept, *lost])  # a head that no file has is left to from_pretrained, which says so


def expert_job(name: str, key: str, file: str, weight, names: Names, after: dict, config: BnbqConfig) -> Job:
    """The job of an expert weight of which ``key`` is the first tensor; the caller adds the tensors."""
    count, *_ = shape = tuple(weight.weight.shape)
    n, k = (shape[2], shape[1]) if weight.transposed else shape[1:]
    prefix = names.file_name(name, key)
    if prefix.endswith(".weight") or names.find(f"{prefix}.qweight", after)[0] != f"{name}.qweight":
        prefix = name  # "weight.absmax" is bitsandbytes' name for another tensor; for the rest as with linear layers
    return Job(
        key,
        file,
        0,
        prefix,
        name,
        (n, k),
        weight.transposed,
        [f"{prefix}.{part}" for part in native_parts(config)],
        [f"{checkpoint.CRC_PREFIX}{prefix}.{part}" for part in native_parts(config)],
        count * packed_size(n, k, config),
        Stack(weight, names),
    )


def wildcards(name: str) -> str:
    """The name with * for the numbers of layers: what two layers of a kind share."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def layer_shape(module) -> tuple[int, int, bool]:
    """(n, k, is the weight stored as [k, n])."""
    if is_conv1d(module):
        k, n = module.weight.shape
        return n, k, True
    return *module.weight.shape, False


def native_parts(config: BnbqConfig) -> list[str]:
    """Names of the parameters that a weight becomes."""
    return list(checkpoint.PACKED_NAMES if config.bits == 4 and config.double_quant else checkpoint.PACKED_NAMES[:2])


def stored_parts(config: BnbqConfig) -> list[str]:
    """Names of the tensors that a weight becomes in the file."""
    if config.checkpoint_format == "bnbq":
        return native_parts(config)
    return checkpoint_bnb.bnb_names(config.embedding_settings())


def float_parts(module) -> list[str]:
    """Names of the float tensors that come into the file with a module's packed ones."""
    return [LIKE] if isinstance(module, torch.nn.Embedding) else []


def packed_size(n: int, k: int, config: BnbqConfig) -> int:
    if config.bits == 8:
        return n * k + 4 * n * (-(-k // config.blocksize) if config.blocksize else 1)
    blocks = -(-n * k // config.blocksize)
    scales = blocks + 4 * -(-blocks // 256) + 4 if config.double_quant else 4 * blocks
    return -(-n * k // 2) + scales + (checkpoint_bnb.SMALL_BYTES if config.checkpoint_format == "bitsandbytes" else 0)


def split(jobs: list[Job], limit: int) -> list[list[Job]]:
    """Consecutive jobs in shards of at most ``limit`` bytes (one job alone may be larger)."""
    groups, size = [[]], 0
    for job in jobs:
        if groups[-1] and size + job.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.size
    return groups


# ------------------------------------------------------------------ work


def metadata(config: BnbqConfig) -> dict[str, str]:
    """What the header of a quantised file has besides checksums."""
    return {"format": "pt", "bnbq_version": str(config.version)}


def write_shards(folder: Path, groups, make, metadata: dict[str, str], progress: bool | None, title: str) -> int:
    """Write every shard and the index; returns the bytes of the tensors written.

    ``make(job)`` returns the job's tensors by their names in the file, and those that its checksums are of.
    """
    weight_map, total = {}, 0
    with bar(sum(job.nbytes for group in groups for job in group), progress, title) as advance:
        for number, group in enumerate(groups, 1):
            name = shards.SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            outputs = [output for job in group for output in job.outputs]
            sums: dict[str, str] = {}
            with shards.ShardWriter(
                folder / name, outputs, metadata, later=[s for job in group for s in job.checksums]
            ) as shard:
                for job in group:
                    tensors, packed = make(job)
                    for output, tensor in tensors.items():
                        shard.add(output, tensor)
                    sums.update(zip(job.checksums, map(checkpoint.crc32, packed), strict=True))
                    advance(job.nbytes)
                shard.close(sums)
                total += shard.position
            weight_map.update(dict.fromkeys(outputs, name))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / shards.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def convert(job: Job, source: shards.Source, config: BnbqConfig, dtype: torch.dtype):
    """(what one tensor of the source becomes, by names in the file; the packed tensors alone, for checksums)."""
    if job.stack is not None:
        native = pack_experts(job, source, config, torch.float32 if dtype == torch.float64 else dtype)
        return {f"{job.prefix}.{part}": value for part, value in native.items()}, tuple(native.values())
    tensor = source.tensor(job.file, job.key)
    if job.module is None:
        return {job.key: tensor}, ()
    # from_pretrained rounds to the model's dtype before it quantises, and so the bytes are the same
    weight = tensor.to(torch.float32 if dtype == torch.float64 else dtype)
    weight = weight.t().contiguous() if job.transposed else weight
    try:
        if config.bits == 8:
            native = dict(
                zip(("qweight", "absmax"), ops.quantize_8bit(weight, blocksize=config.blocksize), strict=True)
            )
        else:
            native = ops.quantize_4bit(
                weight, quant_type=config.quant_type, blocksize=config.blocksize, double_quant=config.double_quant
            )._asdict()
    except ValueError as error:
        raise UserError(
            f"{source.folder / job.file}: tensor {job.key!r}: {where_not_finite(tensor, dtype) or error}"
        ) from error
    native = {part: value for part, value in native.items() if value is not None}
    named = native
    if config.checkpoint_format == "bitsandbytes":
        named = checkpoint_bnb.bnb_from_native(
            native, config.embedding_settings(), shape=job.shape, dtype=dtype, layer=job.module
        )
    if f"{job.prefix}.{LIKE}" in job.outputs:
        named = {**named, LIKE: torch.zeros(1, dtype=dtype)}
    return {f"{job.prefix}.{part}": value for part, value in named.items()}, tuple(native.values())


def pack_experts(job: Job, source: shards.Source, config: BnbqConfig, dtype: torch.dtype) -> dict:
    """The packed tensors of an expert weight by part. Its float tensors are in memory together, and stacked."""
    weight, parts = job.stack.weight, job.stack.parts
    where = f"{source.folder}: {parts[0][0]!r}{f' and {len(parts) - 1} others' if len(parts) > 1 else ''}"
    for key, file, _ in parts:
        if source.dtypes[key] not in FLOAT_NAMES:
            raise UserError(f"{source.folder / file}: {key!r} has dtype {source.dtypes[key]}, a float dtype is wanted")

    def reader(key, file):
        return lambda: source.tensor(file, key).to(dtype)

    try:
        made = job.stack.names.convert(job.module, [(key, pattern, reader(key, file)) for key, file, pattern in parts])
        if list(made) != [job.module]:
            raise ValueError(f"they become {', '.join(made)} when loaded, which cannot be streamed")
        dense = made[job.module]
        layer = experts.layer_class(config.bits).from_weight(
            weight.weight.to("meta"), weight.transposed, **config.layer_settings()
        )
        layer._check_dense(dense)
        return layer.packed(dense)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{where}: {error}") from error


def where_not_finite(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The first NaN or infinity, as the source file counts; None if all are finite."""
    bad = torch.nonzero(~torch.isfinite(tensor.to(dtype)))
    if not len(bad):
        return None
    index = tuple(bad[0].tolist())
    value, cast = tensor[index].item(), f" ({dtype} cannot hold it)" if torch.isfinite(tensor[index]) else ""
    return f"{value} at index {list(index)}{cast}, a finite weight is wanted"


class bar:
    """A progress bar in bytes with the time left, on stderr; nothing where nobody looks."""

    def __init__(self, total: int, show: bool | None, title: str):
        self.bar = None
        if sys.stderr.isatty() if show is None else show:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False)

    def __enter__(self):
        return self.bar.update if self.bar is not None else lambda size: None

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()


def main(arguments) -> int:
    """Run ``bnbq quantize``; ``arguments`` as cli.py parses them."""
    eight = arguments.format == "int8"
    config = BnbqConfig(
        bits=8 if eight else 4,
        quant_type=arguments.format,
        blocksize=arguments.blocksize,
        double_quant=arguments.double_quant or None,
        compute_dtype=arguments.compute_dtype,
        skip_modules=arguments.skip,
        quantize_embeddings=arguments.quantize_embeddings or None,
        checkpoint_format=arguments.checkpoint_format,
    )
    import transformers

    transformers.utils.logging.set_verbosity_error()
    summary = quantize_checkpoint(
        arguments.src, arguments.dst, config, max_shard_size=arguments.max_shard_size, force=arguments.force
    )
    print(summary.text())
    return 0
