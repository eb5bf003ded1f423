"""A whole model: load and quantise, decode, prefill, and a QLoRA step, in the float model's and every peer's hands.

    python -m benchmarks.models [--folder CACHE] [--hidden 2048 --layers 16 --intermediate 8192 --vocab 32000]

The model is a Llama of random weights (1.1 B parameters unless made smaller), with six outlier channels as real models
have, saved once as bf16 safetensors in --folder (default: a temporary one). Each contender lives in a process of its
own, and all of them at once, so that they take turns in rounds; one that waits does nothing.

load    from_pretrained with a quantization_config, from a file in the page cache, after a tiny model has been loaded
        that way ("base": imports are no part of it). "peak" is the most anonymous memory above the base (RssAnon,
        sampled every few milliseconds from outside). The float model's weights stay in the file's mapping and are not
        in it.
first   what the first forward takes beyond the second, where some contenders still convert their weights.
decode  tokens per second, greedy, after a prompt of 32. prefill: tokens per second of one forward over 256.
train   seconds of a LoRA step (r = 16 on all projections, AdamW) on half of the layers, 2 x 256 tokens, and the same
        peak, now with all weights copied from the file's mapping.
"""

import json
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .common import ROOT, Results, available, output, parser, quiet, spread, version

SAMPLE_SECONDS = 0.004
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INFERENCE = ["torch bf16", "bnbq nf4", "bnbq int8", "bitsandbytes nf4", "bitsandbytes int8"]
PROMPT = 32
TINY = "llama-tiny"
TRAINING = ["torch bf16", "bnbq nf4 dq", "bitsandbytes nf4 dq"]


def quantization(contender: str):
    """The quantization_config that from_pretrained gets, or None."""
    import torch

    library, width, *double = contender.split()
    if library == "torch":
        return None
    if library == "bnbq":
        from bnbq import BnbqConfig as Config
    else:
        from transformers import BitsAndBytesConfig as Config
    if width == "int8":
        return Config(load_in_8bit=True)
    return Config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=bool(double),
    )


def installed(contender: str) -> bool:
    return not contender.startswith("bitsandbytes") or version("bitsandbytes") is not None


def make(folder: Path, hidden: int, layers: int, intermediate: int, vocab: int) -> None:
    """The synthetic model, unless it is there already."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.fill_(1.0)[torch.arange(6) * hidden // 6] = 10.0
            else:
                tensor.normal_(std=0.02)
    model.save_pretrained(folder)


# ------------------------------------------------------------------ a contender's process


class Model:
    """What a contender's process does when asked. Each method returns JSON."""

    def __init__(self, contender: str):
        import torch

        self.torch, self.contender, self.model, self.optimizer = torch, contender, None, None
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.quantization = quantization(contender)

    def load(self, folder: str, layers: int, threads: int):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch.set_num_threads(threads)
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=layers)
        begin = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=self.torch.bfloat16,
            device_map="cpu",
            **({"quantization_config": self.quantization} if self.quantization else {}),
        )
        seconds = time.perf_counter() - begin
        self.model.eval()
        return {"seconds": seconds, "weights": sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))}

    def tokens(self, *shape):
        generator = self.torch.Generator().manual_seed(0)
        return self.torch.randint(self.model.config.vocab_size, shape, generator=generator)

    def forward(self, length: int, threads: int):
        self.torch.set_num_threads(threads)
        with self.torch.inference_mode():
            begin = time.perf_counter()
            self.model(self.tokens(1, length))
            return time.perf_counter() - begin

    def decode(self, count: int, threads: int):
        """Seconds of count tokens, greedy, after the prompt and the first token."""
        self.torch.set_num_threads(threads)
        with self.torch.inference_mode():
            ids, cache = self.tokens(1, PROMPT), None
            for i in range(1 + count):
                if i == 1:
                    begin = time.perf_counter()
                output = self.model(ids, past_key_values=cache, use_cache=True)
                ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            return time.perf_counter() - begin

    def adapt(self):
        from peft import LoraConfig, get_peft_model

        for tensor in self.model.parameters():  # out of the file's mapping, so that every byte counts
            tensor.data = tensor.data.clone()
        self.torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        self.model = get_peft_model(self.model, config).train()
        self.optimizer = self.torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, batch: int, length: int, threads: int):
        self.torch.set_num_threads(threads)
        ids = self.tokens(batch, length)
        begin = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin


def serve(contender: str) -> None:
    """Answer requests, a JSON line each: [method, arguments]."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    quiet()
    model = Model(contender)
    print(json.dumps(None), file=answers, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(model, method)(**arguments)), file=answers, flush=True)


# ------------------------------------------------------------------ the parent


class Worker:
    """A contender's process. ``ask`` returns the answer; ``peak`` is the most memory that it was seen to have while
    it worked on what was watched."""

    def __init__(self, contender: str):
        self.contender, self.peak = contender, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.models", "--serve", contender],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def memory(self) -> int:
        """Bytes of anonymous memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contender}: its process ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, method: str, watch: bool = False, **arguments):
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        while watch and not select.select([self.process.stdout], [], [], SAMPLE_SECONDS)[0]:
            self.peak = max(self.peak, self.memory())
        answer = self._answer()
        if watch:
            self.peak = max(self.peak, self.memory())
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start(contenders: list[str], folder: Path, layers: int, threads: int) -> tuple[list[Worker], dict]:
    """A process with the loaded model per contender, and what each load took."""
    workers, loads = [], {}
    for contender in contenders:
        worker = Worker(contender)
        workers.append(worker)
        worker.ask("load", folder=str(folder.with_name(TINY)), layers=1, threads=threads)
        base = worker.memory()
        load = worker.ask("load", watch=True, folder=str(folder), layers=layers, threads=threads)
        loads[contender] = {**load, "peak": worker.peak - base, "base": base}
    return workers, loads


def stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()


def inference(results: Results, contenders: list[str], folder: Path, arguments, threads: list[int]) -> None:
    loads = {contender: [] for contender in contenders}
    for _ in range(arguments.loads - 1):  # the last loads are those that stay
        workers, loaded = start(contenders, folder, arguments.layers, threads[-1])
        stop(workers)
        for contender, load in loaded.items():
            loads[contender].append(load)
    workers, loaded = start(contenders, folder, arguments.layers, threads[-1])
    for worker in workers:
        loads[worker.contender].append(loaded[worker.contender])
        first, second = (worker.ask("forward", length=8, threads=threads[-1]) for _ in range(2))
        about = {name: max(load[name] for load in loads[worker.contender]) for name in ("peak", "base", "weights")}
        row = results.add(
            "load",
            contender=worker.contender,
            threads=threads[-1],
            first=first - second,
            **about,
            **spread([load["seconds"] for load in loads[worker.contender]], "s"),
        )
        print(
            f"{worker.contender:22}load {row['s']:6.2f} s, first forward {row['first']:5.2f} s more, anonymous at "
            f"most {row['peak'] / 1e6:.0f} MB, weights {row['weights'] / 1e6:.0f} MB",
            flush=True,
        )
    prefill, tokens = arguments.prefill, arguments.tokens
    for count in threads:
        speeds = {("prefill", worker.contender): [] for worker in workers}
        speeds |= {("decode", worker.contender): [] for worker in workers}
        for _ in range(arguments.rounds):
            for worker in workers:
                seconds = worker.ask("forward", length=prefill, threads=count)
                speeds["prefill", worker.contender].append(prefill / seconds)
                speeds["decode", worker.contender].append(tokens / worker.ask("decode", count=tokens, threads=count))
        for (kind, contender), values in speeds.items():
            row = results.add(kind, contender=contender, threads=count, **spread(values, "tokens_s"))
            print(
                f"{contender:22}{kind:8}{count} threads {row['tokens_s']:8.1f} tokens/s "
                f"({row['tokens_s_min']:.1f}-{row['tokens_s_max']:.1f})",
                flush=True,
            )
    stop(workers)


def training(results: Results, contenders: list[str], folder: Path, arguments, threads: int) -> None:
    workers, loads = start(contenders, folder, max(1, arguments.layers // 2), threads)
    seconds = {worker.contender: [] for worker in workers}
    for worker in workers:
        worker.ask("adapt")
        worker.peak = 0
    for i in range(1 + arguments.rounds):
        for worker in workers:
            elapsed = worker.ask("step", watch=True, batch=2, length=arguments.prefill, threads=threads)
            if i:  # the first step allocates
                seconds[worker.contender].append(elapsed)
    for worker in workers:
        base = loads[worker.contender]["base"]
        row = results.add(
            "train",
            contender=worker.contender,
            threads=threads,
            peak=worker.peak - base,
            base=base,
            **spread(seconds[worker.contender], "s"),
        )
        print(
            f"{worker.contender:22}train   {threads} threads {row['s']:8.2f} s a step ({row['s_min']:.2f}-"
            f"{row['s_max']:.2f}), at most {row['peak'] / 1e6:.0f} MB",
            flush=True,
        )
    stop(workers)


def main(argv=None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--folder", type=Path, help="where the model is kept for the next time")
    for name, value in (
        ("hidden", 2048),
        ("layers", 16),
        ("intermediate", 8192),
        ("vocab", 32000),
        ("prefill", 256),
        ("tokens", 16),
        ("loads", 1),
    ):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--what", nargs="+", choices=["inference", "training"], default=["inference", "training"])
    options.add_argument("--serve", metavar="CONTENDER", help="how this program starts a contender's process")
    arguments = options.parse_args(argv)
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.quick:
        arguments.layers, arguments.rounds, arguments.loads = min(arguments.layers, 4), 2, 1
    shape = {name: getattr(arguments, name) for name in ("hidden", "layers", "intermediate", "vocab")}
    threads = available(arguments.threads)
    chosen = {
        what: [name for name in names if any(part in name for part in arguments.only) and installed(name)]
        for what, names in (("inference", INFERENCE), ("training", TRAINING))
        if what in arguments.what
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / "x".join(map(str, ("llama", *shape.values())))
        make(folder, **shape)
        make(folder.with_name(TINY), hidden=64, layers=1, intermediate=64, vocab=64)
        with Results(output(arguments, "models.jsonl"), "models") as results:
            results.add("model", **shape, prefill=arguments.prefill, prompt=PROMPT)
            if chosen.get("inference"):
                inference(results, chosen["inference"], folder, arguments, threads)
            if chosen.get("training"):
                training(results, chosen["training"], folder, arguments, threads[-1])


if __name__ == "__main__":
    main()
