"""Quantised layers against PyTorch's float layers and bitsandbytes, in one run.

    python -m benchmarks.against [--shapes 4096x4096 ...] [--m 1 4 16 64 256] [--threads 1 2] [--out FILE]

How it measures: the weights of every contender are copied until they exceed the last-level cache and the
copies rotate, as the layers of a model do; contenders take turns in rounds, so a slow moment of the
machine hits all of them; a figure is the median of the rounds with its spread. One JSON line per
figure goes to --out (with machine, versions and commit), a table to the terminal. `python -m
benchmarks.tables` writes the README's table from such a file.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import bnbq  # noqa: E402
from bnbq import _bnbq, ops  # noqa: E402

COLD_BYTES = 256 << 20
SLOT_SECONDS = 0.03


def copies(nbytes: int) -> int:
    return max(1, -(-COLD_BYTES // nbytes))


def contenders(n: int, k: int):
    """Yield (name, function of (x, call index))."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) * 0.02
    packed = ops.quantize_4bit(w)
    count = copies(n * k // 2 + n * k // 16)
    fours = [(packed.qweight.clone(), packed.absmax.clone()) for _ in range(count)]
    yield "bnbq nf4", lambda x, i: ops.linear4bit(x, *fours[i % count], n)
    q, absmax = ops.quantize_8bit(w)
    count8 = copies(n * k)
    eights = [(q.clone(), absmax.clone()) for _ in range(count8)]
    yield "bnbq int8", lambda x, i: ops.linear8bitlt(x, *eights[i % count8])
    floats = [w.bfloat16() for _ in range(copies(2 * n * k))]
    yield "torch bf16", lambda x, i: F.linear(x.bfloat16(), floats[i % len(floats)])
    singles = [w.clone() for _ in range(copies(4 * n * k))]
    yield "torch fp32", lambda x, i: F.linear(x.float(), singles[i % len(singles)])
    try:
        import bitsandbytes as bnb
    except ImportError:
        print("bitsandbytes is not installed: not compared")
        return
    four_layers, eight_layers = [], []
    for _ in range(copies(n * k // 2 + n * k // 16)):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=False)
        four_layers.append(layer.to("cpu").eval())
    for layer in four_layers:  # it repacks the weight in its first forward on a CPU: not timed
        layer(torch.zeros(1, k, dtype=torch.bfloat16))
    yield "bitsandbytes nf4", lambda x, i: four_layers[i % len(four_layers)](x)
    for _ in range(count8):
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
        eight_layers.append(layer.to("cpu").eval())
    yield "bitsandbytes int8", lambda x, i: eight_layers[i % len(eight_layers)](x)


def sample(run, x, start: int) -> tuple[float, int]:
    """Mean seconds of the calls that fit into one slot, and the next call index."""
    run(x, start)
    calls, begin = 0, time.perf_counter()
    while True:
        calls += 1
        run(x, start + calls)
        elapsed = time.perf_counter() - begin
        if elapsed > SLOT_SECONDS:
            return elapsed / calls, start + calls + 1


def machine() -> dict:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"cpu": cpu, "features": list(_bnbq.cpu_features()), "isa": _bnbq.isa(), "commit": git.stdout.strip(),
            "bnbq": bnbq.__version__, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "layers.jsonl")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    with arguments.out.open("a") as out, torch.no_grad():
        for shape in arguments.shapes:
            n, k = map(int, shape.split("x"))
            runs = dict(contenders(n, k))
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for m in arguments.m:
                    x = torch.randn(m, k).bfloat16()
                    x[:, :6] *= 40  # six outlier columns, so that LLM.int8() works for its money
                    times, index = {name: [] for name in runs}, dict.fromkeys(runs, 0)
                    for _ in range(arguments.rounds):
                        for name, run in runs.items():
                            seconds, index[name] = sample(run, x, index[name])
                            times[name].append(seconds * 1e3)
                    for name, values in times.items():
                        row = {"n": n, "k": k, "m": m, "threads": threads, "contender": name,
                               "ms": statistics.median(values), "ms_min": min(values), "ms_max": max(values),
                               "rounds": len(values), **about}
                        out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(f"{shape} m={m:<4} threads={threads}  " +
                          "  ".join(f"{name} {statistics.median(v):.2f}" for name, v in times.items()), flush=True)


if __name__ == "__main__":
    main()
