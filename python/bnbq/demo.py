"""``bnbq demo``: one real language model, as it is and quantised: size, perplexity, speed, and what it says.

All models read the same held-out text and continue the same prompt, greedily, one after the other, so
that the memory needed is that of one model. See evaluate.py for the measures, fetch.py for the model.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

from . import doctor, fetch
from .errors import UserError

NOTE = (
    "The default model's linear weights were Q4_1 (4 bits) before they became bf16: the table compares\n"
    "implementations and formats on equal terms; it does not say what nf4 costs a model that was never 4-bit."
)


def main(arguments) -> int:
    """Run ``bnbq demo``; ``arguments`` as cli.py parses them."""
    started = time.perf_counter()
    default = arguments.model is None
    if default:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the default model never needs a hub
        model_id = str(fetch.demo_model(arguments.cache, say=lambda line: print(line, flush=True)))
    else:
        model_id = arguments.model
    import torch
    import transformers

    from . import _bnbq, evaluate

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = evaluate.file_text(arguments.text) if arguments.text else evaluate.python_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_id)
    config = transformers.AutoConfig.from_pretrained(model_id)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{model_id}: already quantised; the demo needs the float model")
    length = min(arguments.length, getattr(config, "max_position_embeddings", None) or arguments.length)
    windows = evaluate.windows(tokenizer, text.held_out, arguments.windows, length)
    facts = {
        "model": "SmolLM2-135M-Instruct" if default else model_id,
        "text": text.name,
        "text_sha256": text.sha256,
        "windows": len(windows),
        "length": length,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "threads": torch.get_num_threads(),
        "cpu": doctor.cpu_name(),
        "isa": _bnbq.isa(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(
        f"{facts['model']}; perplexity on {len(windows)} x {length} tokens of {text.name}\n"
        f"(sha256 {text.sha256[:12]}); {facts['cpu']}, threads: {facts['threads']}, kernels: {facts['isa']}\n",
        flush=True,
    )

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    rows, reference = [], None
    for name in ["float", *dict.fromkeys(arguments.format)]:
        status(f"{name} ...")
        row, quality = measure(name, model_id, dtype, tokenizer, windows, reference, arguments)
        reference = reference or quality
        rows.append(row)
    status("")
    facts.update(rows=rows, seconds=round(time.perf_counter() - started, 1), note=NOTE if default else None)
    show(rows)
    print(f"\nPrompt: {arguments.prompt}")
    for row in rows:
        print(f"\n[{row['name']}] {' '.join(row['text'].split())}")
    print(f"\n{NOTE}\n" if default else "", end="")
    print(f"Prompt and text speeds are medians after a warm-up; {facts['seconds']} s in all.")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(name, model_id, dtype, tokenizer, windows, reference, arguments):
    """Load one model and judge it: (row of the table, its Quality)."""
    import transformers

    import bnbq

    from . import evaluate

    config = (
        None
        if name == "float"
        else bnbq.BnbqConfig(bits=8)
        if name == "int8"
        else bnbq.BnbqConfig(bits=4, quant_type=name)
    )
    extra = {} if config is None else {"quantization_config": config}
    started = time.perf_counter()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype, **extra).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{model_id}: cannot be loaded as a causal language model ({error})") from error
    loaded = time.perf_counter() - started
    quality = evaluate.judge(model, windows, reference, keep=reference is None)
    prefill, prefill_spread = evaluate.prefill_rate(model, windows[0])
    said = evaluate.generate(model, tokenizer, arguments.prompt, arguments.new_tokens)
    label = str(model.dtype).removeprefix("torch.") if config is None else name
    row = {
        "name": label,
        "bytes": bnbq.get_memory_footprint(model),
        "load_seconds": loaded,
        "perplexity": quality.perplexity,
        "losses": quality.losses,
        "kl": quality.kl,
        "top1": quality.top1,
        "prefill": prefill,
        "prefill_spread": prefill_spread,
        "decode": said.decode,
        "decode_spread": said.decode_spread,
        "text": said.text,
        "tokens": said.tokens,
    }
    del model
    gc.collect()
    return row, quality


COLUMNS = ("", "size MB", "of float", "perplexity", "KL", "prompt tok/s", "text tok/s")


def cells(row, base) -> list[str]:
    def number(value, digits):
        return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"

    return [
        row["name"],
        number(row["bytes"] / 1e6, 1),
        f"{row['bytes'] / base['bytes']:.0%}",
        number(row["perplexity"], 3),
        number(row["kl"], 4),
        number(row["prefill"], 0),
        number(row["decode"], 1),
    ]


def show(rows) -> None:
    """The table: through rich on a terminal that has it, as plain text otherwise."""
    lines = [cells(row, rows[0]) for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            for i, column in enumerate(COLUMNS):
                table.add_column(column, justify="right" if i else "left", no_wrap=True)
            for line in lines:
                table.add_row(*line)
            Console().print(table)
            return
    print(plain_table([COLUMNS, *lines]))


def plain_table(lines) -> str:
    """Columns padded to their widest cell; the first one to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def status(line: str) -> None:
    """What is being done, on a terminal only; the next line overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
