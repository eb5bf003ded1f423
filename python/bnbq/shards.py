"""Safetensors read and written one tensor at a time.

The format: u64 length of the header, the header (JSON: name -> dtype, shape, [start, end) in the data;
``__metadata__``: strings), then the data without holes. A writer needs the header first and knows
checksums last, so `ShardWriter` leaves room for the longest header that the planned names can make,
appends the tensors as they come and fills the room in at the end (JSON may end in spaces).

Data stay aligned to the size of their dtype, as readers that map files expect: what is not a multiple
of 8 bytes waits in a temporary file and goes last, widest dtype first.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from pathlib import Path

import torch

from .checkpoint import SAFETENSORS_DTYPES
from .errors import UserError

PIECE = 1 << 24
"""Bytes written at once."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, u8[nbytes], not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


class ShardWriter:
    """One safetensors file. ``names`` are all the tensors that `add` may be given, ``metadata`` goes
    into the header, and `close` may add to it keys announced by ``later`` (each value at most 16
    characters). Used as a context manager the file is closed, finished or not."""

    def __init__(self, path, names, metadata: dict[str, str], later=()):
        self.path, self.metadata = Path(path), dict(metadata)
        self.expected, self.entries, self.waiting = set(names), {}, []
        widest = {name: {"dtype": "F8_E4M3", "shape": [10**12] * 8, "data_offsets": [10**15] * 2} for name in names}
        widest["__metadata__"] = {**metadata, **dict.fromkeys(later, "x" * 16)}
        self.room = -(-len(json.dumps(widest).encode()) // 8) * 8
        self.position = 0
        self.file = open(self.path, "xb")  # noqa: SIM115  (closed by __exit__)
        self.spill = None
        self.file.write(struct.pack("<Q", self.room) + b" " * self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor. ValueError for a name that was not planned or came before."""
        if name not in self.expected or name in self.entries or any(w[0] == name for w in self.waiting):
            raise ValueError(f"{self.path.name}: tensor {name!r} was not planned or came twice")
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{self.path.name}: tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold"
            )
        data = as_bytes(tensor.contiguous())
        if len(data) % 8:
            self.spill = self.spill or tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self.waiting.append(
                (
                    name,
                    tensor.dtype.itemsize,
                    SAFETENSORS_DTYPES[tensor.dtype],
                    list(tensor.shape),
                    self.spill.tell(),
                    len(data),
                )
            )
            self.spill.write(data)
            return
        for start in range(0, len(data), PIECE):
            self.file.write(data[start : start + PIECE])
        self.enter(name, SAFETENSORS_DTYPES[tensor.dtype], list(tensor.shape), len(data))

    def enter(self, name, dtype, shape, size):
        self.entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.position, self.position + size]}
        self.position += size

    def close(self, more_metadata: dict[str, str] | None = None) -> None:
        """Write what waited and the header. ValueError if a planned tensor never came."""
        for name, _, dtype, shape, start, size in sorted(self.waiting, key=lambda w: (-w[1], w[0])):
            self.spill.seek(start)
            left = size
            while left:
                piece = self.spill.read(min(left, PIECE))
                self.file.write(piece)
                left -= len(piece)
            self.enter(name, dtype, shape, size)
        missing = self.expected - self.entries.keys()
        if missing:
            raise ValueError(f"{self.path.name}: planned tensors never came: {', '.join(sorted(missing)[:5])}")
        header = {"__metadata__": {**self.metadata, **(more_metadata or {})}, **self.entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self.room:
            raise ValueError(f"{self.path.name}: the header needs {len(text)} bytes, {self.room} were left for it")
        self.file.seek(8)
        self.file.write(text.ljust(self.room))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.spill is not None:
            self.spill.close()


class Source:
    """The safetensors of a checkpoint directory: one file, or shards with an index.

    ``shapes[key]`` and ``dtypes[key]`` come from the headers alone; `tensor` maps the file. Every
    mistake in the directory is a UserError that names the file.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files: dict[str, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file, wanted in self._find().items():
            with self._open(file) as handle:
                keys = handle.offset_keys() if hasattr(handle, "offset_keys") else list(handle.keys())
                if wanted is not None and (lost := wanted - set(keys)):
                    raise UserError(f"{self.folder / file}: tensor {min(lost)!r} is in {INDEX} but not in the file")
                self.files[file] = [key for key in keys if wanted is None or key in wanted]
                self.metadata[file] = handle.metadata() or {}
                for key in self.files[file]:
                    part = handle.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()
        self._now = (None, None)

    def _find(self) -> dict[str, set[str] | None]:
        if (self.folder / SINGLE).is_file():
            return {SINGLE: None}
        path = self.folder / INDEX
        if path.is_file():
            try:
                weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                files: dict[str, set[str]] = {}
                for key, file in weight_map.items():
                    files.setdefault(file, set()).add(key)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: not an index of safetensors shards ({type(error).__name__}: {error})"
                ) from error
            for file in files:
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise UserError(f"{path}: {file!r} is not the name of a safetensors file beside it")
            return dict(sorted(files.items()))
        others = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
        if others:
            raise UserError(
                f"{self.folder}: only safetensors are read, found {others[0]}; load the model with "
                "Transformers and save_pretrained it first"
            )
        raise UserError(f"{self.folder}: no {SINGLE} and no {INDEX}")

    def _open(self, file):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / file, framework="pt")
        except FileNotFoundError as error:
            raise UserError(f"{self.folder / file}: named in {INDEX}, but not there") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / file}: not a whole safetensors file ({error})") from error

    def tensor(self, file: str, key: str) -> torch.Tensor:
        """A tensor of a file, mapped rather than read where the system allows it."""
        if self._now[0] != file:
            self._now = (file, self._open(file))
        return self._now[1].get_tensor(key)

    def locate(self) -> dict[str, str]:
        """Tensor -> file."""
        return {key: file for file, keys in self.files.items() for key in keys}


def tensor_bytes(source: Source, key: str) -> int:
    """Size of a tensor by its header."""
    bits = {"F4": 4, "BOOL": 8}.get(source.dtypes[key]) or int(re.search(r"\d+", source.dtypes[key]).group())
    return torch.Size(source.shapes[key]).numel() * bits // 8
