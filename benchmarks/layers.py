"""One layer over a fine grid of m: is there a cliff, and what does batch invariance cost?

    python -m benchmarks.layers [--shape 4096x4096] [--dtype bf16] [--threads 1 2]

Two rules, by medians: a call with more rows never takes 10 % less time than one with fewer, and bnbq is never more than
10 % (fp32: 20 %) slower than torch's fastest float layer on the same activations. Every violation is listed. The
columns "invariant" have `bnbq.set_batch_invariant(True)`.
"""

import logging
import warnings

import torch

from bnbq import _bnbq

from . import contenders
from .against import DTYPES, forward
from .common import FLOATS, Results, available, interleave, output, parse_shape, parser, spread

BATCHES = [1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512]
MONOTONE = 1.1
SLOWER = {"bf16": 1.1, "fp32": 1.2}


def invariant(call):
    def switched(i):
        _bnbq.set_batch_invariant(True)
        call(i)
        _bnbq.set_batch_invariant(False)

    return switched


def violations(ms: dict[tuple[str, int], float], dtype: str) -> list[str]:
    """The rules broken, in words. ``ms`` by name and m."""
    found = []
    for name in sorted({name for name, _ in ms if name.startswith("bnbq")}):
        most, at = 0.0, 0
        for m in sorted(m for other, m in ms if other == name):
            if ms[name, m] * MONOTONE < most:
                found.append(f"{name}: m={at} takes {most:.3f} ms, m={m} only {ms[name, m]:.3f}")
            if ms[name, m] > most:
                most, at = ms[name, m], m
            fastest = min(ms[floats, m] for floats in FLOATS if (floats, m) in ms)
            if ms[name, m] > fastest * SLOWER[dtype]:
                found.append(f"{name}: m={m} takes {ms[name, m]:.3f} ms, {ms[name, m] / fastest:.2f} x torch's float")
    return found


def main(argv=None) -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="4096x4096", metavar="NxK")
    options.add_argument("--m", nargs="+", type=int, default=BATCHES)
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    options.add_argument("--outliers", choices=contenders.OUTLIERS, default="6")
    arguments = options.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    n, k = parse_shape(arguments.shape)
    batches = sorted(arguments.m)[:: 4 if arguments.quick else 1]
    layers = contenders.build(n, k, DTYPES[arguments.dtype], ["bnbq nf4", "bnbq int8", *FLOATS])
    with Results(output(arguments, "cliffs.jsonl"), "layers") as results:
        for count in available(arguments.threads):
            torch.set_num_threads(count)
            ms = {}
            print(f"\n{n} x {k}, {arguments.dtype}, outliers {arguments.outliers}, {count} threads")
            for m in batches:
                x = contenders.activations(m, k, arguments.outliers)
                calls = {name: forward(layer, x, n) for name, layer in layers.items()}
                calls |= {f"{name} invariant": invariant(call) for name, call in calls.items() if "bnbq" in name}
                for name, seconds in interleave(calls, arguments.rounds).items():
                    row = results.add(
                        "cliff",
                        contender=name,
                        n=n,
                        k=k,
                        m=m,
                        threads=count,
                        dtype=arguments.dtype,
                        outliers=arguments.outliers,
                        **spread(seconds, "ms", 1e3),
                    )
                    ms[name, m] = row["ms"]
                if m == batches[0]:
                    print(f"{'ms':8}" + "".join(f"{name:>21}" for name in calls))
                print(f"m={m:<6}" + "".join(f"{ms[name, m]:21.3f}" for name in calls), flush=True)
            broken = violations(ms, arguments.dtype)
            results.add("violations", threads=count, found=broken)
            print("\n".join(broken) or "no cliff, and never behind torch's float layers")


if __name__ == "__main__":
    main()
