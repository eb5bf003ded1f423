"""One layer over a fine grid of m, and over kinds of outliers: is there a cliff? What does batch invariance cost?

    python -m benchmarks.layers [--shape 4096x4096] [--dtype bf16] [--threads 1 2]

Two rules, by medians: a call with more rows never takes 10 % less time than one with fewer, and bnbq is never more than
10 % (fp32: 20 %) slower than torch's fastest float layer on the same activations. Every violation is listed. The
columns "invariant" have `bnbq.set_batch_invariant(True)`.
"""

import torch

from bnbq import _bnbq

from . import contenders
from .against import DTYPES, forward
from .common import FLOATS, Results, available, describe, interleave, output, parse_shape, parser, quiet, spread

BATCHES = [1, 2, 3, 4, 6, 8, 12, 15, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512]
COMPARED = ("bnbq nf4", "bnbq int8", *FLOATS)
MONOTONE = 1.1
SLOWER = {"bf16": 1.1, "fp32": 1.2}


def invariant(call):
    def switched(i):
        _bnbq.set_batch_invariant(True)
        call(i)
        _bnbq.set_batch_invariant(False)

    return switched


def violations(ms: dict[tuple[str, int], float], dtype: str) -> list[dict]:
    """Where a rule is broken, and by what factor. ``ms`` by name and m."""
    found = []
    for name in ("bnbq nf4", "bnbq int8"):
        most = 0.0
        for m in sorted(m for other, m in ms if other == name):
            here = {"contender": name, "m": m}
            if most > ms[name, m] * MONOTONE:
                found.append({**here, "rule": "a smaller m takes longer", "factor": most / ms[name, m]})
            most = max(most, ms[name, m])
            fastest = min(ms[other, m] for other in FLOATS if (other, m) in ms)
            if ms[name, m] > fastest * SLOWER[dtype]:
                found.append({**here, "rule": "torch's float layer is faster", "factor": ms[name, m] / fastest})
    return found


def over_m(results: Results, layers, about: dict, batches: list[int], outliers: str, rounds: int) -> None:
    """The grid of m, and the rules."""
    ms = {}
    print(f"\n{describe(about)}, outliers {outliers}")
    for m in batches:
        x = contenders.activations(m, about["k"], outliers)
        calls = {name: forward(layer, x, about["n"]) for name, layer in layers.items() if name in COMPARED}
        calls |= {f"{name} invariant": invariant(call) for name, call in calls.items() if "bnbq" in name}
        for name, seconds in interleave(calls, rounds).items():
            figures = {"m": m, "outliers": outliers, **spread(seconds, "ms", 1e3)}
            ms[name, m] = results.add("cliff", contender=name, **about, **figures)["ms"]
        if m == batches[0]:
            print(f"{'ms':8}" + "".join(f"{name:>21}" for name in calls))
        print(f"m={m:<6}" + "".join(f"{ms[name, m]:21.3f}" for name in calls), flush=True)
    broken = violations(ms, about["dtype"])
    for row in broken:
        results.add("violation", threads=about["threads"], **row)
        print(f"{row['contender']}, m={row['m']}: {row['rule']}, {row['factor']:.2f} times")
    if not broken:
        print("no cliff, and never behind torch's float layers")


def over_outliers(results: Results, layers, about: dict, batches: list[int], rounds: int) -> None:
    """LLM.int8() on activations of every kind, beside bitsandbytes'."""
    settings = contenders.OUTLIERS
    print(f"\n{'outliers, ms':28}" + "".join(f"{setting:>12}" for setting in settings))
    for m in batches:
        xs = {setting: contenders.activations(m, about["k"], setting) for setting in settings}
        calls = {
            (name, setting): forward(layers[name], x, about["n"])
            for name in layers
            if "int8" in name
            for setting, x in xs.items()
        }
        ms = {}
        for (name, setting), seconds in interleave(calls, rounds).items():
            figures = {"m": m, "outliers": setting, **spread(seconds, "ms", 1e3)}
            ms[name, setting] = results.add("outliers", contender=name, **about, **figures)["ms"]
        for name in dict.fromkeys(name for name, _ in ms):
            print(f"{f'{name}, m={m}':28}" + "".join(f"{ms[name, setting]:12.3f}" for setting in settings), flush=True)


def main(argv=None) -> None:
    options = parser(__doc__, only=False)
    options.add_argument("--shape", default="4096x4096", metavar="NxK")
    options.add_argument("--m", nargs="+", type=int, default=BATCHES)
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    options.add_argument("--outliers", choices=contenders.OUTLIERS, default="6", help="while m varies")
    arguments = options.parse_args(argv)
    quiet()
    n, k = parse_shape(arguments.shape)
    batches = sorted(arguments.m)[:: 4 if arguments.quick else 1]
    layers = contenders.build(n, k, DTYPES[arguments.dtype], [*COMPARED, "bitsandbytes int8"])
    with Results(output(arguments, "cliffs.jsonl"), "layers") as results:
        for count in available(arguments.threads):
            torch.set_num_threads(count)
            about = dict(n=n, k=k, threads=count, dtype=arguments.dtype)
            over_m(results, layers, about, batches, arguments.outliers, arguments.rounds)
            over_outliers(results, layers, about, [64] if arguments.quick else [1, 64, 256], arguments.rounds)


if __name__ == "__main__":
    main()
