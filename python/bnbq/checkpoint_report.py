"""``bnbq report PATH``: the quantised layers of a checkpoint directory, read without building the model.

Understands what bnbq writes (save_pretrained, ``bnbq quantize``, ``bnbq.save``) and what bitsandbytes
writes. With ``--against`` each weight is compared with the float checkpoint's::

    error   |W - Q| / |W| in the Frobenius norm
    SNR     the same in decibels, -20 log10(error)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from . import checkpoint, checkpoint_bnb, shards
from .config import BnbqConfig
from .errors import UserError
from .side_branch import PARTS


@dataclass
class Layer:
    """One quantised layer. ``shape`` is [out, in], of experts [experts, out, in], None where neither file nor float
    model tells it. ``nbytes`` and ``bits`` count a side branch of rank ``side_rank``, and the error is with it."""

    name: str
    format: str
    shape: list[int] | None
    blocksize: int
    double_quant: bool
    nbytes: int
    bits: float | None
    kernel: str
    side_rank: int = 0
    error: float | None = None
    snr: float | None = None


class Checkpoint:
    """A quantised checkpoint directory: `names` of its layers, `parts` of each, `settings`."""

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: not a directory")
        self.plain = None
        if (self.path / checkpoint.SETTINGS).is_file():
            self.plain = checkpoint.read_settings(self.path / checkpoint.SETTINGS)["layers"]
            self.config, self.method = None, "bnbq"
        else:
            self.config, self.method = self._read_config()
        self.source = shards.Source(self.path)
        self.files = self.source.locate()
        self.recorded = {
            name: crc
            for metadata in self.source.metadata.values()
            for name, crc in checkpoint.recorded_checksums(metadata).items()
        }
        suffixes = {"bnbq": (".qweight",), "bitsandbytes": (".weight.absmax", ".SCB")}[self.method]
        self.names = [key[: -len(suffix)] for key in self.files for suffix in suffixes if key.endswith(suffix)]
        if not self.names:
            raise UserError(
                f"{self.path}: quantised by {self.method} according to its config, but it has no quantised layer"
            )

    def _read_config(self):
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(f"{self.path}: not a checkpoint (neither config.json nor {checkpoint.SETTINGS})")
        try:
            settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not the JSON of a model ({error})") from error
        if not settings:
            raise UserError(f"{self.path}: not quantised (config.json has no quantization_config)")
        method = settings.get("quant_method", "bitsandbytes")
        if method not in ("bnbq", "bitsandbytes"):
            raise UserError(f"{self.path}: quantised by {method}; bnbq's and bitsandbytes' checkpoints are read")
        try:
            return BnbqConfig.from_dict(settings), "bitsandbytes" if settings.get(
                "checkpoint_format"
            ) == "bitsandbytes" else method
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: quantization_config: {error}") from error

    def keys(self, name: str) -> dict[str, str]:
        """Part of the layer -> name in the files; the bias is no part."""
        known = (
            (*checkpoint.PACKED_NAMES, *PARTS)
            if self.method == "bnbq"
            else (*checkpoint_bnb.BNB4_KEYS, *checkpoint_bnb.BNB8_KEYS)
        )
        return {part: f"{name}.{part}" for part in dict.fromkeys(known) if f"{name}.{part}" in self.files}

    def read(self, name: str) -> dict:
        """The layer's tensors, compared with their checksums."""
        keys = self.keys(name)
        tensors = {key: self.source.tensor(self.files[key], key) for key in keys.values()}
        checkpoint.verify_checksums(tensors, self.recorded, self.path)
        return {part: tensors[key] for part, key in keys.items()}

    def describe(self, name: str) -> Layer:
        """A row of the report from headers (and, of bitsandbytes' files, a small JSON)."""
        keys = self.keys(name)
        nbytes = sum(shards.tensor_bytes(self.source, key) for key in keys.values())
        bits, quant_type, blocksize, shape = 8, "int8", 0, None
        if self.plain is not None:
            if name not in self.plain:
                raise UserError(f"{self.path}: {checkpoint.SETTINGS} does not describe {name}")
            layer = checkpoint.layer_from_settings(self.plain[name], f"{self.path / checkpoint.SETTINGS}: {name}")
            bits, shape = 4 if hasattr(layer, "quant_type") else 8, layer.weight_shape
            quant_type, blocksize = getattr(layer, "quant_type", "int8"), layer.blocksize
        elif self.method == "bnbq":
            bits, quant_type, blocksize = self.config.bits, self.config.quant_type, self.config.blocksize
            packed = self.source.shapes[keys["qweight"]]
            shape = None if len(packed) == 1 else (*packed[:-1], packed[-1] * (8 // bits))
        elif "SCB" in keys:
            shape = self.source.shapes[keys["weight"]]
        else:
            small = {
                part: self.source.tensor(self.files[key], key)
                for part, key in keys.items()
                if part not in ("weight", "weight.absmax")
            }
            settings = checkpoint_bnb.bnb4_settings(small, name)
            bits, quant_type, blocksize, shape = 4, settings["quant_type"], settings["blocksize"], settings["shape"]
        flat = bits == 4 and (shape is None or shape[-1] % blocksize)
        double = "absmax2" in keys or "weight.nested_absmax" in keys
        count = math.prod(shape) if shape else None
        return Layer(
            name,
            quant_type + ("+dq" if double else ""),
            list(shape) if shape else None,
            blocksize,
            double,
            nbytes,
            8 * nbytes / count if count else None,
            "generic" if flat else kernel("q4" if bits == 4 else "s8"),
            (self.source.shapes[keys[PARTS[0]]] or (0,))[0] if PARTS[0] in keys else 0,
        )

    def dequantize(self, row: Layer):
        """The layer's weight, f32[out, in]."""
        from . import ops

        parts, bits = self.read(row.name), 8 if row.format == "int8" else 4
        if len(row.shape or ()) == 3:
            return self.dequantize_experts(row, parts, bits)
        if self.method == "bitsandbytes":
            convert = checkpoint_bnb.native_from_bnb8 if bits == 8 else checkpoint_bnb.native_from_bnb4
            parts, _ = convert(parts, row.name, tuple(row.shape))
        try:
            branch = parts[PARTS[1]].float() @ parts[PARTS[0]].float() if row.side_rank else 0
            if bits == 8:
                return ops.dequantize_8bit(parts["qweight"], parts["absmax"], blocksize=row.blocksize) + branch
            weight = ops.dequantize_4bit(
                parts["qweight"],
                parts["absmax"],
                tuple(row.shape),
                absmax2=parts.get("absmax2"),
                absmax_offset=parts.get("absmax_offset"),
                quant_type=row.format.removesuffix("+dq"),
                blocksize=row.blocksize,
            )
            return weight + branch
        except KeyError as error:
            raise UserError(f"{self.path}: {row.name} has no tensor {error}") from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.path}: {row.name}: {error}") from error

    def dequantize_experts(self, row: Layer, parts: dict, bits: int):
        """f32[experts, n, k]."""
        from .experts import layer_class

        count, n, k = row.shape
        settings = {"quant_type": row.format.removesuffix("+dq"), "double_quant": row.double_quant} if bits == 4 else {}
        experts = layer_class(bits)(count, k, n, blocksize=row.blocksize, device="meta", **settings)
        experts.load_state_dict(parts, assign=True)
        return experts.dequantize()


def kernel(family: str) -> str:
    """The kernel that this machine's CPU would run: "q4_avx512"."""
    from . import _bnbq

    return next((f"{family}_{row['isa']}" for row in _bnbq.rows() if row["family"] == family and row["in_use"]), family)


def find_float(source: shards.Source, name: str) -> str:
    """The float checkpoint's key for a layer; they may differ by a prefix (a model saved with or without its head)."""
    wanted = f"{name}.weight"
    if wanted in source.shapes:
        return wanted
    close = [
        key
        for key in source.shapes
        if key.endswith(f".{wanted}") or (key.endswith(".weight") and wanted.endswith(f".{key}"))
    ]
    if len(close) != 1:
        raise UserError(f"{source.folder}: no float weight for the layer {name}")
    return close[0]


def is_expert_weight(source: shards.Source, row: Layer) -> bool:
    """Is a row about experts, going by its shape or by what the float checkpoint has in its place?"""
    if f"{row.name}.weight" in source.shapes:
        return False
    owner = row.name.rpartition(".")[0]
    return (
        len(row.shape or ()) == 3
        or row.name in source.shapes
        or any(key.startswith(f"{owner}.0.") for key in source.shapes)
    )


def compare(target: Checkpoint, row: Layer, source: shards.Source, files: dict[str, str]) -> None:
    """Fill in a row's error and SNR; not of experts that the float checkpoint stores one by one, or whose blocks
    cross rows (no file says where their rows end)."""
    experts = is_expert_weight(source, row)
    if experts and (row.name not in source.shapes or len(row.shape or ()) != 3):
        return
    key = row.name if experts else find_float(source, row.name)
    dense = source.tensor(files[key], key).float()
    if dense.dim() != (3 if experts else 2):
        raise UserError(f"{source.folder}: {key} has shape {list(dense.shape)}, a linear layer's weight is wanted")
    row.shape = row.shape or list(dense.shape)
    count = math.prod(row.shape)
    row.bits = 8 * row.nbytes / count
    weight = target.dequantize(row)
    if sorted(dense.shape) != sorted(weight.shape):
        raise UserError(
            f"{source.folder}: {key} has shape {list(dense.shape)}, the quantised layer {list(weight.shape)}"
        )
    # GPT-2's Conv1D and some experts store it transposed; where the shape does not tell, the smaller error does
    candidates = [d for d in (dense, dense.mT) if d.shape == weight.shape]
    norm = dense.double().norm().item()
    distance = min((weight - d).double().norm().item() for d in candidates)
    row.error = distance / norm if norm else (0.0 if distance == 0 else math.inf)
    row.snr = -20 * math.log10(row.error) if 0 < row.error < math.inf else None


def examine(path, against=None) -> dict:
    """The report as a JSON-able dict: path, method, layers (see `Layer`), totals."""
    target = Checkpoint(path)
    rows = [target.describe(name) for name in target.names]
    if against is not None:
        if not Path(against).is_dir():
            raise UserError(f"{against}: not a directory")
        source = shards.Source(against)
        files = source.locate()
        for row in rows:
            compare(target, row, source, files)
    packed = {key for row in rows for key in target.keys(row.name).values()}
    rest = {key: shards.tensor_bytes(target.source, key) for key in target.files if key not in packed}
    counts = [math.prod(row.shape) for row in rows if row.shape]
    quantized = sum(row.nbytes for row in rows)
    totals = {
        "layers": len(rows),
        "weights": sum(counts),
        "bytes": quantized,
        "other_bytes": sum(rest.values()),
        "bits": 8 * quantized / sum(counts) if len(counts) == len(rows) else None,
        "largest_other": sorted(rest, key=rest.get, reverse=True)[:3],
    }
    if against is not None:
        errors = [row.error for row in rows if row.error is not None]
        totals["error"] = sum(errors) / len(errors) if errors else None
    return {
        "path": str(path),
        "method": target.method,
        "against": str(against) if against else None,
        "layers": [asdict(row) for row in rows],
        "totals": totals,
    }


def describe(facts: dict) -> str:
    """The report for people."""
    from .demo import plain_table

    compared = facts["against"] is not None
    lines = [["layer", "format", "shape", "bits", "bytes", "kernel"] + (["error", "SNR dB"] if compared else [])]
    for row in facts["layers"]:
        line = [
            row["name"],
            row["format"]
            + (f"/{row['blocksize']}" if row["blocksize"] else "")
            + (f" + rank {row['side_rank']}" if row["side_rank"] else ""),
            "x".join(map(str, row["shape"])) if row["shape"] else "flat",
            f"{row['bits']:.2f}" if row["bits"] else "-",
            f"{row['nbytes']:,}",
            row["kernel"],
        ]
        if compared:
            known = row["error"] is not None
            snr = f"{row['snr']:.2f}" if row["snr"] is not None else "exact" if known else "-"
            line += [f"{row['error']:.5f}" if known else "-", snr]
        lines.append(line)
    totals = facts["totals"]
    share = 100 * totals["bytes"] / max(totals["bytes"] + totals["other_bytes"], 1)
    text = [
        plain_table(lines),
        "",
        f"{facts['path']} ({facts['method']}): {totals['layers']} quantised layers, {totals['weights']:,} weights, "
        f"{totals['bytes'] / 1e6:,.1f} MB" + (f", {totals['bits']:.2f} bits a weight" if totals["bits"] else ""),
        f"other tensors: {totals['other_bytes'] / 1e6:,.1f} MB, {100 - share:.1f} % of the file"
        + (f" (largest: {', '.join(totals['largest_other'])})" if totals["largest_other"] else ""),
    ]
    if compared and totals["error"] is not None:
        text.append(f"mean relative error {totals['error']:.5f} against {facts['against']}")
    return "\n".join(text)


def main(arguments) -> int:
    """Run ``bnbq report``."""
    facts = examine(arguments.path, arguments.against)
    print(json.dumps(facts, indent=2) if arguments.json else describe(facts))
    return 0
