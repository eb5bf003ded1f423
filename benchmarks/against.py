"""bnbq's layers against PyTorch's and bitsandbytes', in one run.

    python -m benchmarks.against               one product y = x W^T, over shapes, m and threads
    python -m benchmarks.against --backward    forward and gradient to the input, through a frozen weight
    python -m benchmarks.against --quantize    a weight quantised, and dequantised
    python -m benchmarks.against --call-cost   what a call costs before it computes anything: 64 x 64, m = 1
    python -m benchmarks.against --all         all of it, which README.md's tables need: about six minutes

How it measures: the weights of every contender are copied until they exceed the last-level cache and the copies
rotate, as the layers of a model do; contenders take turns in rounds, so a slow moment of the machine hits all of
them; a figure is the median of the rounds with its range. BNBQ_ISA caps bnbq's kernels as everywhere.
"""

import ctypes

import torch
import torch.nn.functional as F

import bnbq
from bnbq import _bnbq, ops

from . import contenders
from .common import Results, available, interleave, limit_seconds, output, parse_shape, parser, peers, quiet, spread

SHAPES = ["4096x4096", "14336x4096", "4096x14336", "576x1536", "1536x576", "49152x576"]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
QUICK = [1, 16, 256]
COARSE = [1, 4, 16, 64, 256]  # for the other shapes, unless --m says otherwise
SLOW_ROUNDS = 3  # at most, for everything but the first shape
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def table(title: str, rows: list[dict]) -> None:
    """One line per contender, one column per m, and below how many times faster bnbq is than each peer."""
    batches = list(dict.fromkeys(row["m"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ms = {(row["contender"], row["m"]): row["ms"] for row in rows}
    print(f"\n{title}\n{'ms':40}" + "".join(f"{f'm={m}':>9}" for m in batches))
    for name in names:
        print(f"{name:40}" + "".join(f"{ms[name, m]:9.3f}" for m in batches))
    limits = {(row["contender"], row["m"]): row["ms"] / row["limit_ms"] for row in rows}
    for ours in (name for name in names if name.startswith("bnbq")):
        for peer in peers(ours, names):
            print(f"{f'{peer} / {ours}':40}" + "".join(f"{ms[peer, m] / ms[ours, m]:9.2f}" for m in batches))
        print(f"{f'{ours} / limit':40}" + "".join(f"{limits[ours, m]:9.2f}" for m in batches), flush=True)


def linear(results: Results, shape: str, batches, threads, rounds: int, arguments, backward=False) -> None:
    (n, k), dtype, outliers = parse_shape(shape), arguments.dtype, arguments.outliers
    kind, passes, timed = ("backward", 2, forward_backward) if backward else ("linear", 1, forward)
    layers = contenders.build(n, k, DTYPES[dtype], arguments.only, training=backward)
    for count in threads:
        torch.set_num_threads(count)
        rows = []
        for m in batches:
            x = contenders.activations(m, k, outliers)
            times = interleave({name: timed(layer, x, n) for name, layer in layers.items()}, rounds)
            for name, seconds in times.items():
                layer, about = layers[name], dict(n=n, k=k, m=m, threads=count, dtype=dtype, outliers=outliers)
                limit = passes * limit_seconds(results.limits[count], layer.nbytes, 2 * m * n * k, layer.arithmetic)
                figures = {"limit_ms": 1e3 * limit, **spread(seconds, "ms", 1e3)}
                rows.append(results.add(kind, contender=name, **about, **figures))
        table(f"{kind}, {shape}, {dtype}, outliers {outliers}, {count} threads", rows)


def forward(layer, x, n):
    x = x.to(layer.dtype)

    def call(i):
        with torch.no_grad():
            layer(x, i)

    return call


def forward_backward(layer, x, n):
    x = x.to(layer.dtype).requires_grad_()
    gy = torch.randn(x.shape[0], n).to(layer.dtype)

    def call(i):
        x.grad = None
        layer(x, i).backward(gy)

    return call


def conversions(n: int, k: int, dtype: str) -> dict:
    """(call, bytes read and written) by name, for a weight in dtype. Results are new tensors, as in a load, or, where
    the name says so, written into one that is reused."""
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).to(DTYPES[dtype])
    out = torch.empty_like(w)
    four, eight = w.nbytes + n * k // 2 + n * k // 16, w.nbytes + n * k + 4 * n
    qweight, absmax, *_ = ops.quantize_4bit(w)
    q8, absmax8 = ops.quantize_8bit(w)
    cases = {
        "torch copy, reused": (lambda i: out.copy_(w), 2 * w.nbytes),
        "bnbq quantize nf4": (lambda i: ops.quantize_4bit(w), four),
        "bnbq quantize nf4 dq": (lambda i: ops.quantize_4bit(w, double_quant=True), four),
        "bnbq quantize int8": (lambda i: ops.quantize_8bit(w), eight),
        "bnbq dequantize nf4": (lambda i: ops.dequantize_4bit(qweight, absmax, (n, k), dtype=out.dtype), four),
        "bnbq dequantize nf4, reused": (
            lambda i: _bnbq.dequantize_4bit(qweight, absmax, None, None, out, "nf4", 64),
            four,
        ),
        "bnbq dequantize int8, reused": (lambda i: _bnbq.dequantize_8bit(q8, absmax8, out, 0), eight),
    }
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        print(f"bitsandbytes is not compared: {error}")
        return cases
    B = bnb.functional
    packed, state = B.quantize_4bit(w, blocksize=64, quant_type="nf4")
    cases |= {
        "bitsandbytes quantize nf4": (lambda i: B.quantize_4bit(w, blocksize=64, quant_type="nf4"), four),
        "bitsandbytes quantize nf4 dq": (
            lambda i: B.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True),
            four,
        ),
        "bitsandbytes quantize int8": (lambda i: B.int8_vectorwise_quant(w.half()), eight),
        "bitsandbytes dequantize nf4": (lambda i: B.dequantize_4bit(packed, state), four),
    }
    # Its operator has no out= on a CPU; its C function, which the operator calls, writes anywhere.
    function = getattr(bnb.cextension.lib, f"cdequantize_blockwise_cpu_nf4_{dtype}", None)
    if function is not None:
        pointers = [B.get_ptr(tensor) for tensor in (packed, state.absmax, out)]
        sizes = [ctypes.c_longlong(size) for size in (64, n, k)]
        cases["bitsandbytes dequantize nf4, reused"] = (lambda i: function(*pointers, *sizes), four)
    return cases


def quantize(results: Results, shape: str, threads, rounds: int, arguments) -> None:
    n, k = parse_shape(shape)
    for dtype in DTYPES:
        cases = {
            name: case
            for name, case in conversions(n, k, dtype).items()
            if any(part in name for part in arguments.only)
        }
        for count in threads:
            torch.set_num_threads(count)
            print(f"\n{n} x {k} {dtype}, {count} threads\n{'':40}{'ms':>9}{'GB/s':>9}{'x limit':>9}")
            with torch.no_grad():
                times = interleave({name: call for name, (call, _) in cases.items()}, rounds)
            for name, seconds in times.items():
                nbytes = cases[name][1]
                row = results.add(
                    "quantize",
                    contender=name,
                    n=n,
                    k=k,
                    dtype=dtype,
                    threads=count,
                    limit_ms=nbytes / results.limits[count]["read_gbs"] / 1e6,
                    **spread(seconds, "ms", 1e3),
                )
                print(
                    f"{name:40}{row['ms']:9.2f}{nbytes / row['ms'] / 1e6:9.1f}{row['ms'] / row['limit_ms']:9.2f}",
                    flush=True,
                )


def call_cost(results: Results, arguments) -> None:
    """Microseconds of a call on a layer so small that the call is all there is."""
    n = k = 64
    dtype = DTYPES[arguments.dtype]
    torch.set_num_threads(1)
    w = torch.randn(n, k).to(dtype)
    x = torch.randn(1, k).to(dtype)
    packed, (q8, absmax8) = ops.quantize_4bit(w), ops.quantize_8bit(w)
    plain = contenders.linear(w)
    modules = {
        "torch nn.Linear": plain,
        "bnbq Linear4bit": bnbq.nn.Linear4bit.from_linear(plain),
        "bnbq Linear8bitLt": bnbq.nn.Linear8bitLt.from_linear(plain),
    }
    try:
        with torch.no_grad():
            modules["bitsandbytes Linear4bit"] = contenders.bitsandbytes_4bit(w.float(), dtype, False).layers[0]
            modules["bitsandbytes Linear8bitLt"] = contenders.bitsandbytes_8bit(w.float(), dtype, False).layers[0]
    except ImportError as error:
        print(f"bitsandbytes is not compared: {error}")
    calls = {
        "torch F.linear": lambda i: F.linear(x, w),
        "bnbq ops.linear4bit": lambda i: ops.linear4bit(x, packed.qweight, packed.absmax, n),
        "bnbq ops.linear8bitlt": lambda i: ops.linear8bitlt(x, q8, absmax8),
        **{name: lambda i, module=module: module(x) for name, module in modules.items()},
    }
    calls = {name: call for name, call in calls.items() if any(part in name for part in arguments.only)}
    print(f"\ncall cost, {arguments.dtype}")
    with torch.no_grad():
        for name, seconds in interleave(calls, arguments.rounds).items():
            row = results.add(
                "call", contender=name, n=n, k=k, m=1, threads=1, dtype=arguments.dtype, **spread(seconds, "us", 1e6)
            )
            print(f"{name:40}{row['us']:9.2f} us", flush=True)


def main(argv=None) -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", metavar="NxK", help=f"default {' '.join(SHAPES)}")
    options.add_argument("--m", nargs="+", type=int, help="default: 1 to 512 for the first shape, five for others")
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")
    options.add_argument("--outliers", choices=contenders.OUTLIERS, default="6")
    for flag in ("--backward", "--quantize", "--call-cost", "--all"):
        options.add_argument(flag, action="store_true")
    arguments = options.parse_args(argv)
    quiet()
    threads = available(arguments.threads)
    quick, only_one = arguments.quick, arguments.backward or arguments.quantize or arguments.call_cost
    slow_rounds = min(arguments.rounds, SLOW_ROUNDS)
    with Results(output(arguments, "layers.jsonl"), "against", threads) as results:
        if arguments.all or not only_one:
            for shape in arguments.shapes or (SHAPES[:1] if quick else SHAPES):
                first = shape == SHAPES[0]
                batches = arguments.m or (QUICK if quick else BATCHES if first else COARSE)
                linear(results, shape, batches, threads, arguments.rounds if first else slow_rounds, arguments)
        for shape in arguments.shapes or (SHAPES[:1] if quick else SHAPES[1:2]):
            if arguments.all or arguments.backward:
                batches = arguments.m or ([256] if quick else [16, 64, 256])
                linear(results, shape, batches, threads, slow_rounds, arguments, backward=True)
            if arguments.all or arguments.quantize:
                quantize(results, shape, threads, slow_rounds, arguments)
        if arguments.all or arguments.call_cost:
            call_cost(results, arguments)


if __name__ == "__main__":
    main()
