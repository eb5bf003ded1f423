"""Directories of checkpoints: what may be read and replaced, and a new one that appears all at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
"""Weights in any format: they are converted, not copied."""


def check_places(src: Path, dst: Path, force: bool) -> None:
    """Refuse a source that is no checkpoint, and a destination that would overwrite something."""
    if not src.is_dir():
        raise UserError(f"{src}: not a directory (a model of the hub must be downloaded first: hf download NAME)")
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"{dst}: must lie outside of {src}, and not around it")
    if not b.parent.is_dir():
        raise UserError(f"{dst}: its parent directory does not exist")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        if not force:
            raise UserError(f"{dst}: exists and is not empty; give --force to replace it")
        if not dst.is_dir() or not (dst / "config.json").is_file():
            raise UserError(f"{dst}: --force replaces a checkpoint, but there is no config.json in it")


class staging:
    """A temporary directory beside ``dst``, renamed to it on success and removed on any exception."""

    def __init__(self, dst: Path, force: bool):
        self.dst, self.force = dst.absolute(), force

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.dst.name}.unfinished-", dir=self.dst.parent))
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, kind, value, traceback):
        try:
            if kind is None:
                self.publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self):
        old = None
        if self.force and self.dst.exists() and any(self.dst.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{self.dst.name}.replaced-", dir=self.dst.parent))
            self.dst.rename(old / "checkpoint")
        try:
            self.folder.rename(self.dst)  # POSIX replaces an empty directory
        except OSError as error:
            if old is not None:
                (old / "checkpoint").rename(self.dst)
            raise UserError(f"{self.dst}: could not be put in place ({error})") from error
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)


def copy_side_files(src: Path, folder: Path) -> None:
    """Tokenizer, generation config, licence: every file of the top level that holds no weights."""
    for path in sorted(src.iterdir()):
        name = path.name
        if path.is_dir():
            if name == "additional_chat_templates":
                shutil.copytree(path, folder / name)
        elif (
            path.is_file()
            and not name.startswith(".")
            and path.suffix not in WEIGHT_SUFFIXES
            and not name.endswith(".index.json")
            and name != "config.json"
        ):
            shutil.copyfile(path, folder / name)
