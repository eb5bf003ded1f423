"""Every kernel that this processor can run: each family on each instruction set.

    python -m benchmarks.kernels [--shape 4096x4096] [--m 1 4 16 64 256] [--threads 1]

Columns: median milliseconds, GB/s of weight read (and written, when converting), Gop/s, and the share of what memory
and arithmetic of this machine allow, whatever the instruction set (`common.measure_limits`). Activations are bf16; the
edge family runs inside each operation, and by itself in none. Instruction sets take turns; a case on which one took
over half a second is left out for its larger m.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from bnbq import _bnbq, ops

from .common import Results, available, copies, describe, interleave, limit_seconds, output, parse_shape, parser, spread

SLOW_SECONDS = 0.5


def levels(family: str) -> dict[str, str]:
    """Kernels of the family that run here, each with the instruction set that BNBQ_ISA would name for it."""
    found, before = {}, _bnbq.isa()
    for level in _bnbq.isas():
        _bnbq.set_isa(level)
        found.setdefault(next(row["isa"] for row in _bnbq.rows() if row["family"] == family and row["in_use"]), level)
    _bnbq.set_isa(before)
    return found


class Case(NamedTuple):
    operation: str
    m: int  # 0: there is no x
    nbytes: int
    operations: int
    arithmetic: str
    call: Callable[[int], None]  # of the index of the weight's copy


def cases(family: str, n: int, k: int, batches: list[int]) -> Iterator[Case]:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = ops.quantize_8bit(w) if family == "s8" else ops.quantize_4bit(w)[:2]
    nbytes = sum(tensor.nbytes for tensor in packed)
    weights = [tuple(tensor.clone() for tensor in packed) for _ in range(copies(nbytes))]

    def pick(i):
        return weights[i % len(weights)]

    if family == "w4a8":  # the weights of q4, and nothing but the product

        def linear(x, y, i):
            _bnbq.linear4bit(x, *pick(i), None, None, None, y, "nf4", 64, None, "int8")

    elif family == "q4":

        def linear(x, y, i):
            _bnbq.linear4bit(x, *pick(i), None, None, None, y, "nf4", 64, None, None)

        def backward(gy, gx, i):
            _bnbq.linear4bit_backward(gy, *pick(i), None, None, gx, "nf4", 64, None)

        def quantize(dense, i):
            _bnbq.quantize_4bit(dense, *pick(i), "nf4", 64)

        def dequantize(dense, i):
            _bnbq.dequantize_4bit(*pick(i), None, None, dense, "nf4", 64)

    else:

        def linear(x, y, i):
            _bnbq.linear8bitlt(x, *pick(i), None, y, 6.0, 0)

        def backward(gy, gx, i):
            _bnbq.linear8bitlt_backward(gy, *pick(i), gx, 0)

        def quantize(dense, i):
            _bnbq.quantize_8bit(dense, *pick(i), 0)

        def dequantize(dense, i):
            _bnbq.dequantize_8bit(*pick(i), dense, 0)

    for m in batches:
        x, y = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
        arithmetic = "bf16" if family == "q4" else "int8"
        yield Case("linear", m, nbytes, 2 * m * n * k, arithmetic, partial(linear, x, y.clone()))
        if family == "w4a8":
            continue
        yield Case("backward", m, nbytes, 2 * m * n * k, "bf16", partial(backward, y, x.clone()))
    for dtype in (torch.bfloat16, torch.float32) if family != "w4a8" else ():
        dense, name = w.to(dtype), str(dtype).removeprefix("torch.")
        yield Case(f"quantize {name}", 0, nbytes + dense.nbytes, 0, "fp32", partial(quantize, dense))
        yield Case(f"dequantize {name}", 0, nbytes + dense.nbytes, 0, "fp32", partial(dequantize, dense))


def on(level: str, call):
    """The call with the instruction sets above level out of reach."""

    def capped(i):
        _bnbq.set_isa(level)
        call(i)

    return capped


def main(argv=None) -> None:
    options = parser(__doc__, rounds=3)
    options.set_defaults(threads=[1])
    options.add_argument("--shape", default="4096x4096", metavar="NxK")
    options.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    arguments = options.parse_args(argv)
    n, k = parse_shape(arguments.shape)
    batches = sorted([1, 64] if arguments.quick else arguments.m)
    threads, before = available(arguments.threads), _bnbq.isa()
    with Results(output(arguments, "kernels.jsonl"), "kernels", threads) as results:
        for family in ("q4", "s8", "w4a8"):
            kernels = {
                isa: level
                for isa, level in levels(family).items()
                if any(part in f"{family}_{isa}" for part in arguments.only)
            }
            slow = set()
            for case in cases(family, n, k, batches):
                for count in threads:
                    torch.set_num_threads(count)
                    calls = {
                        isa: on(level, case.call) for isa, level in kernels.items() if (isa, case.operation) not in slow
                    }
                    limit = limit_seconds(results.limits[count], case.nbytes, case.operations, case.arithmetic)
                    about = dict(family=family, operation=case.operation, n=n, k=k, m=case.m, threads=count)
                    print(f"\n{describe(about)}\n{'':14}{'ms':>10}{'GB/s':>9}{'Gop/s':>9}{'limit/time':>12}")
                    for isa, times in interleave(calls, arguments.rounds).items():
                        row = results.add("kernel", kernels=isa, **about, **spread(times, "ms", 1e3))
                        seconds = row["ms"] / 1e3
                        if seconds > SLOW_SECONDS:
                            slow.add((isa, case.operation))
                        print(
                            f"{isa:14}{row['ms']:10.3f}{case.nbytes / seconds / 1e9:9.2f}"
                            f"{case.operations / seconds / 1e9:9.1f}{limit / seconds:12.2f}",
                            flush=True,
                        )
    _bnbq.set_isa(before)


if __name__ == "__main__":
    main()
