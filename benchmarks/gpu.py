"""On a GPU: 4-bit and int8 layers against cuBLAS and, where it is installed, bitsandbytes.

    python -m benchmarks.gpu [--shape 4096x4096] [--m 1 16 256] [--publish]

One line of results per shape, m and contender: microseconds of a call inside a CUDA graph (kernels alone) and called
one after another from Python (eager), both with cold weights, which rotate over several times the L2 cache. bf16 in
and out; six columns with outliers. Copying, quantising and dequantising are given in GB/s of memory moved, beside a
device copy's. Contenders take turns over several rounds; the median counts.
"""

from collections.abc import Callable

import torch

from bnbq import _bnbq, ops

from .common import Results, describe, output, parse_shape, parser, spread, version

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672)]
ROWS = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
CALLS = 20  # in a graph, and in a row from Python
COLD_L2 = 4  # copies of the weights hold that many times the L2 cache


def rotating(make: Callable[[], tuple], nbytes: int) -> Callable[[int], tuple]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    weights = [make() for _ in range(max(2, -(-COLD_L2 * cache // nbytes)))]
    return lambda i: weights[i % len(weights)]


def layers(n: int, k: int, only: list[str]) -> dict[str, Callable[[int, torch.Tensor], torch.Tensor]]:
    """call(i, x) with copy i of the weight."""
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).to("cuda", torch.bfloat16)
    made = {}

    def wanted(name):
        return any(part in name for part in only)

    if wanted("cublas bf16"):
        dense = rotating(lambda: (w.clone(),), w.nbytes)
        made["cublas bf16"] = lambda i, x: torch.nn.functional.linear(x, *dense(i))
    for double in (False, True):
        name = "bnbq nf4 dq" if double else "bnbq nf4"
        if wanted(name):
            packed = ops.quantize_4bit(w, double_quant=double)
            four = rotating(lambda packed=packed: tuple(None if t is None else t.clone() for t in packed), n * k // 2)
            made[name] = lambda i, x, four=four: linear4(x, four(i), n)
    if wanted("bnbq int8"):
        q, absmax = ops.quantize_8bit(w)
        eight = rotating(lambda: (q.clone(), absmax.clone()), n * k)
        made["bnbq int8"] = lambda i, x: ops.linear8bitlt(x, *eight(i))
    if version("bitsandbytes"):
        made |= {name: call for name, call in peers(w, n, k).items() if wanted(name)}
    return made


def linear4(x, packed, n):
    return ops.linear4bit(x, packed[0], packed[1], n, absmax2=packed[2], absmax_offset=packed[3])


def peers(w: torch.Tensor, n: int, k: int) -> dict[str, Callable]:
    import bitsandbytes as bnb

    def four():
        layer = bnb.nn.LinearNF4(k, n, bias=False, compute_dtype=torch.bfloat16)
        layer.weight.data = w.cpu().clone()
        return (layer.to("cuda"),)

    def eight():
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight.data = w.cpu().clone()
        return (layer.to("cuda"),)

    fours, eights = rotating(four, n * k // 2), rotating(eight, n * k)
    return {"bitsandbytes nf4": lambda i, x: fours(i)[0](x), "bitsandbytes int8": lambda i, x: eights(i)[0](x)}


# ------------------------------------------------------------------ timing


def milliseconds(work: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def captured(call: Callable[[int], object]) -> Callable[[], None] | None:
    """CALLS calls as a graph; None for what cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                call(i)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def compare(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{contender: {"graph" or "eager": microseconds of a call, one per round}}"""
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for name, call in calls.items():
        for i in range(3):
            call(i)

        def eager(call=call):
            for i in range(CALLS):
                call(i)

        runs[name, "eager"] = eager
        graph = captured(call)
        if graph is not None:
            runs[name, "graph"] = graph
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            elapsed = milliseconds(run) / CALLS * 1e3
            if turn:  # the first round warms up
                times[key].append(elapsed)
    found: dict[str, dict[str, list[float]]] = {}
    for (name, mode), values in times.items():
        found.setdefault(name, {})[mode] = values
    return found


def bandwidth(results: Results, rounds: int) -> None:
    """GB/s moved by a copy, by quantising and by dequantising 14336 x 4096 in bf16."""
    n, k = 14336, 4096
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    packed, (q, absmax) = ops.quantize_4bit(w), ops.quantize_8bit(w)
    double = ops.quantize_4bit(w, double_quant=True)
    out = torch.empty_like(w)
    read = w.nbytes

    def moved(tensors):
        return sum(t.nbytes for t in tensors if t is not None)

    cases = {
        "copy": (lambda i: out.copy_(w), 2 * read),
        "quantize nf4": (lambda i: ops.quantize_4bit(w), read + moved(packed)),
        "quantize nf4 dq": (lambda i: ops.quantize_4bit(w, double_quant=True), read + moved(double)),
        "dequantize nf4": (lambda i: ops.dequantize_4bit(*packed[:2], (n, k), dtype=w.dtype), read + moved(packed)),
        "dequantize nf4 dq": (
            lambda i: ops.dequantize_4bit(double.qweight, double.absmax, (n, k), absmax2=double.absmax2,
                                          absmax_offset=double.absmax_offset, dtype=w.dtype),
            read + moved(double),
        ),
        "quantize int8": (lambda i: ops.quantize_8bit(w), read + moved((q, absmax))),
        "dequantize int8": (lambda i: ops.dequantize_8bit(q, absmax, dtype=w.dtype), read + moved((q, absmax))),
    }
    times = compare({name: call for name, (call, _) in cases.items()}, rounds)
    for name, (_, nbytes) in cases.items():
        for mode, values in times[name].items():
            rates = [nbytes / value / 1e3 for value in values]
            print(describe(results.add("bandwidth", what=name, mode=mode, **spread(rates, "gbs"))), flush=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", nargs="+", type=parse_shape, default=SHAPES)
    arguments.add_argument("--m", nargs="+", type=int, default=ROWS)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    about = {"gpu": properties.name, "multiprocessors": properties.multi_processor_count,
             "cuda": torch.version.cuda, **{f"built_{key}": value for key, value in _bnbq.build_info().items()}}
    shapes, rows = (options.shape[:1], options.m[:3]) if options.quick else (options.shape, options.m)
    with Results(output(options, "gpu.jsonl"), "gpu") as results, torch.no_grad():
        results.add("device", **about)
        if options.only == [""]:
            bandwidth(results, options.rounds)
        for n, k in shapes:
            contenders = layers(n, k, options.only)
            for m in rows:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                x[:, :6] *= 20
                calls = {name: lambda i, call=call, x=x: call(i, x) for name, call in contenders.items()}
                times = compare(calls, options.rounds)
                for name, modes in times.items():
                    row = {"n": n, "k": k, "m": m, "layer": name}
                    for mode, values in modes.items():
                        row |= spread(values, f"{mode}_us")
                    print(describe(results.add("layer", **row)), flush=True)
            del contenders
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
