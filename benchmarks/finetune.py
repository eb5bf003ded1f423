"""A LoRA fine-tune of the demo's model: on the quantised base, and on its dequantised weights in bf16.

Both start from the same weights as values, with the same adapters, data and optimiser, and so should end at the same
held-out loss: what differs is the arithmetic of the frozen layers. Trained on windows of the first quarter of the text
that `bnbq demo` judges on, judged on the rest.
"""

import time
from pathlib import Path
from typing import NamedTuple

from .common import Results, describe, output, parser, quiet
from .models import PROJECTIONS

FORMATS = {"nf4 dq": dict(bits=4, double_quant=True), "int8": dict(bits=8)}


class Outcome(NamedTuple):
    """Mean held-out loss before and after, in nats a token; seconds of training."""

    before: float
    after: float
    seconds: float


def base_model(folder: Path, settings: dict, quantized: bool):
    """The model in this format, or in bf16 with the same weights as values."""
    import torch
    import transformers

    import bnbq

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bnbq.BnbqConfig(**settings), dtype=torch.bfloat16
    )
    return model if quantized else model.dequantize(torch.bfloat16)


def adapt(model, rank: int):
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def train(model, windows, steps: int, batch: int, rate: float) -> None:
    """AdamW at a constant rate; windows int64[length] are taken in turn."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        ids = torch.stack([windows[(step * batch + i) % len(windows)] for i in range(batch)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def held_out_loss(model, windows) -> float:
    import statistics

    from bnbq import evaluate

    return statistics.fmean(evaluate.judge(model.eval(), windows).losses)


def outcome(folder: Path, settings: dict, quantized: bool, arguments, keep: Path | None = None) -> Outcome:
    """Fine-tune one model; ``keep`` is where its adapter is saved."""
    import transformers

    from bnbq import evaluate

    text = evaluate.python_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    training = evaluate.windows(tokenizer, text.calibration, arguments.windows, arguments.length)
    judged = evaluate.windows(tokenizer, text.held_out, arguments.judged, arguments.length)
    model = adapt(base_model(folder, settings, quantized), arguments.rank)
    before = held_out_loss(model, judged)
    begin = time.perf_counter()
    train(model, training, arguments.steps, arguments.batch, arguments.rate)
    seconds = time.perf_counter() - begin
    if keep is not None:
        model.save_pretrained(keep)
    return Outcome(before, held_out_loss(model, judged), seconds)


def options():
    result = parser(__doc__, only=False)
    for name, value in (("steps", 40), ("batch", 1), ("windows", 40), ("judged", 8), ("length", 512), ("rank", 16)):
        result.add_argument(f"--{name}", type=int, default=value)
    result.add_argument("--rate", type=float, default=2e-4)
    result.add_argument("--format", choices=FORMATS, nargs="+", default=list(FORMATS))
    result.add_argument("--keep", type=Path, metavar="FOLDER", help="save the adapters there")
    return result


def main(argv=None) -> dict:
    """Returns (format, "quantised" or "bf16") -> Outcome."""
    import torch

    from bnbq import fetch

    arguments = options().parse_args(argv)
    quiet()
    if arguments.quick:
        arguments.steps, arguments.judged, arguments.format = 10, 4, arguments.format[:1]
    torch.set_num_threads(max(arguments.threads))
    folder, results = fetch.demo_model(), {}
    with Results(output(arguments, "finetune.jsonl"), "finetune") as file:
        for name in arguments.format:
            for kind in ("quantised", "bf16"):
                keep = arguments.keep and arguments.keep / f"{name}-{kind}".replace(" ", "-")
                result = outcome(folder, FORMATS[name], kind == "quantised", arguments, keep)
                results[name, kind] = result
                print(
                    describe(file.add("finetune", format=name, base=kind, steps=arguments.steps, **result._asdict())),
                    flush=True,
                )
    return results


if __name__ == "__main__":
    main()
