"""Quality and speed of a causal language model: perplexity, divergence from another model, tokens/s.

Every model is judged on the same windows of the same text. The default text is the language
reference that comes with Python (``pydoc_data.topics``): always there and in plain English. Its first
quarter is left for calibration and never judged. It differs between Python versions, so figures are
comparable within one Python only; `Text.sha256` says which text it was.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import UserError

CALIBRATION_SHARE = 0.25
KL_STRIDE = 16
"""The distributions of every 16th position are compared: 32 a window of 512, 50 MB for 49152 words."""


@dataclass(frozen=True)
class Text:
    """A text to judge on: ``name`` for people, ``held_out`` the part to use, ``calibration`` what comes before it."""

    name: str
    held_out: str
    calibration: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.held_out.encode()).hexdigest()


def python_text() -> Text:
    """The held-out part of the running Python's own documentation."""
    import platform

    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions put it into a package of its own
        raise UserError("this Python comes without pydoc_data.topics: give a text with --text FILE") from error
    pages = [topics[name] for name in sorted(topics)]
    text = "\n\n".join(pages)
    start = int(len(text) * CALIBRATION_SHARE)
    return Text(f"the language reference of Python {platform.python_version()}", text[start:], text[:start])


def file_text(path) -> Text:
    """A text file, the whole of it."""
    return Text(str(path), Path(path).read_text(encoding="utf-8"))


def windows(tokenizer, text: str, count: int, length: int) -> list[torch.Tensor]:
    """Up to ``count`` separate windows of ``length`` tokens, int64[length], spread evenly over the text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = min(count, len(ids) // length)
    if not count:
        raise UserError(f"the text has {len(ids)} tokens, one window needs {length}")
    step = (len(ids) - length) / max(1, count - 1)
    return [ids[int(i * step) : int(i * step) + length] for i in range(count)]


@dataclass
class Quality:
    """What `judge` found. ``kl`` and ``top1`` are None without a reference."""

    losses: list[float]
    kl: float | None = None
    top1: float | None = None
    log_probs: list[torch.Tensor] = field(default_factory=list, repr=False)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))


@torch.inference_mode()
def judge(model, wins, reference: Quality | None = None, keep: bool = False) -> Quality:
    """Mean loss of each window; with a ``reference`` made by ``keep=True``, the divergence from it too.

    ``kl`` is the mean KL(reference || model) in nats, ``top1`` the share of positions with the same
    best token, both over every 16th position.
    """
    losses, kept, kl, same = [], [], [], []
    for i, window in enumerate(wins):
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0].cpu()
        total = 0.0
        for start in range(0, len(window) - 1, 128):  # a slice at a time: fp32 logits of a window are big
            part = logits[start : start + 128].float()
            target = window[start + 1 : start + 129]
            total += torch.nn.functional.cross_entropy(part[: len(target)], target, reduction="sum").item()
        losses.append(total / (len(window) - 1))
        if keep or reference:
            q = logits[KL_STRIDE - 1 :: KL_STRIDE].float().log_softmax(-1)
        if keep:
            kept.append(q)
        if reference:
            p = reference.log_probs[i]
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).float())
    mean = (lambda parts: torch.cat(parts).mean().item()) if reference else lambda parts: None
    return Quality(losses, mean(kl), mean(same), kept)


class Stopwatch:
    """Handed to ``generate`` as its streamer: notes when each token came."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def intervals(self) -> list[float]:
        """Seconds for each token after the first; the first one's time is the prompt's."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


@dataclass
class Generation:
    """``text`` and its tokens; ``decode`` the median and ``prefill`` rates in tokens/s with their spread."""

    text: str
    tokens: list[int]
    decode: float
    decode_spread: tuple[float, float]


@torch.inference_mode()
def generate(model, tokenizer, prompt: str, new_tokens: int) -> Generation:
    """Greedy continuation of a prompt (through the chat template if there is one) and the decode speed."""
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    watch = Stopwatch()
    model.generate(**inputs, do_sample=False, max_new_tokens=4, pad_token_id=pad)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad, streamer=watch)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    rate, spread = rates(watch.intervals(), 1)
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), new, rate, spread)


@torch.inference_mode()
def prefill_rate(model, window, rounds: int = 3):
    """Tokens/s at which a prompt is read (only its last position's logits are made): median, (worst, best)."""
    import inspect

    arguments = {"input_ids": window[None].to(model.device), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    seconds = []
    for i in range(rounds + 1):
        start = time.perf_counter()
        model(**arguments)
        if i:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    return rates(seconds, len(window))


def rates(seconds: list[float], tokens: int):
    """Median and (worst, best) of tokens / seconds; NaN where nothing was timed."""
    if not seconds:
        return math.nan, (math.nan, math.nan)
    return tokens / statistics.median(seconds), (tokens / max(seconds), tokens / min(seconds))
