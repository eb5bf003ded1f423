"""What the benchmarks share: the machine, its measured limits, interleaved timing, results as JSON lines.

A results file holds runs, oldest first. A run is a line that describes it (benchmark, machine, versions, commit,
measured limits), a line per figure, and a last line that says that it was completed.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLD_BYTES = 256 << 20  # copies of a weight rotate over this much, more than a last-level cache keeps
SLOT_SECONDS = 0.025


def quiet() -> None:
    """Warnings of the libraries that are measured are not for who reads the figures."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def copies(nbytes: int) -> int:
    """How many copies of a weight keep it cold."""
    return -(-COLD_BYTES // nbytes)


# ------------------------------------------------------------------ timing


def sample(call: Callable[[int], object], start: int) -> tuple[float, int]:
    """Mean seconds of the calls that fit into one slot after a first one, and the next call's index.

    A call longer than a slot is its own sample. Its weight is cold either way, since copies rotate.
    """
    begin = time.perf_counter()
    call(start)
    first = time.perf_counter() - begin
    if first > SLOT_SECONDS:
        return first, start + 1
    calls, begin = 0, time.perf_counter()
    while True:
        calls += 1
        call(start + calls)
        elapsed = time.perf_counter() - begin
        if elapsed > SLOT_SECONDS:
            return elapsed / calls, start + calls + 1


def interleave(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds by name, one sample a round. Contenders take turns, so that a slow moment hits all of them, in an
    order that alternates. ``call(i)`` uses copy i of its weights, modulo their number."""
    seconds = {name: [] for name in calls}
    index = {}
    for name, call in calls.items():  # what a first call sets up is not timed
        call(0)
        index[name] = 1
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                mean, index[name] = sample(calls[name], index[name])
                seconds[name].append(mean)
            order.reverse()
    finally:
        gc.enable()
    return seconds


def spread(values: list[float], unit: str, scale: float = 1.0) -> dict:
    """Median and range, as the fields of a result."""
    return {
        unit: scale * statistics.median(values),
        f"{unit}_min": scale * min(values),
        f"{unit}_max": scale * max(values),
        "rounds": len(values),
    }


# ------------------------------------------------------------------ the machine


def best(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_limits(threads: int) -> dict:
    """What torch reaches on this machine: reading memory (GB/s) and multiplying (Gop/s by type).

    Reading is the best of a maximum and a dot product over twice COLD_BYTES. Multiplying is the best of oneDNN's and
    MKL's matrix products in three sizes: near the processor's peak, not above it, so a share of it can exceed 1.
    """
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    memory = torch.ones(2, COLD_BYTES // 4)
    read = min(best(memory.amax), best(lambda: torch.dot(*memory)))
    limits = {"read_gbs": memory.nbytes / read / 1e9}
    products = {
        "fp32": (torch.float32, F.linear),
        "bf16": (torch.bfloat16, F.linear),
        "int8": (torch.int8, lambda x, w: torch._int_mm(x, w.t())),
    }
    for name, (dtype, product) in products.items():
        reached = 0.0
        for m, n, k in ((256, 512, 512), (512, 512, 512), (1024, 1024, 1024)):
            x, w = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
            with torch.no_grad():
                seconds = best(lambda product=product, x=x, w=w: product(x, w))
            reached = max(reached, 2 * m * n * k / seconds / 1e9)
        limits[f"{name}_gops"] = reached
    return limits


def limit_seconds(limits: dict, nbytes: float, operations: float, arithmetic: str) -> float:
    """The least time that memory and arithmetic allow."""
    return max(nbytes / limits["read_gbs"], operations / limits[f"{arithmetic}_gops"]) / 1e9


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, with a + where the sources differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "csrc", "python", "setup.py"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout)


def processor() -> str:
    """Its name, family and model; virtual machines often hide the rest."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


def machine() -> dict:
    import bnbq
    from bnbq import _bnbq

    return {
        "cpu": processor(),
        "cores": cores(),
        "features": list(_bnbq.cpu_features()),
        "isa": _bnbq.isa(),
        "commit": commit(),
        "bnbq": bnbq.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "bitsandbytes", "transformers", "peft")},
    }


# ------------------------------------------------------------------ results


class Results:
    """Appends a run to a file, with six digits; as a context manager, marks it complete when no exception ends it.

    With ``threads``, the limits are measured first and described with the machine.
    """

    def __init__(self, path: Path, benchmark: str, threads=()):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.limits = {count: measure_limits(count) for count in threads}
        self.file = path.open("a")
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._line({"run": benchmark, "started": started, **machine(), "limits": self.limits})

    def _line(self, row: dict) -> None:
        row = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def add(self, kind: str, **row) -> dict:
        row = {"kind": kind, **row}
        self._line(row)
        return row

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._line({"end": True})
        self.file.close()


def describe(row: dict) -> str:
    """Fields for the terminal."""
    return ", ".join(f"{name} {value}" for name, value in row.items())


class Run(NamedTuple):
    about: dict
    rows: list[dict]


def newest(path: Path, kind: str) -> Run | None:
    """The rows of this kind of the newest complete run that has any."""
    found, about, rows = None, None, []
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "run" in row:
            about, rows = row, []
        elif row.get("kind") == kind:
            rows.append(row)
        elif "end" in row and rows:
            found = Run(about, rows)
    return found


FLOATS = ("torch bf16", "torch fp32")


def peers(ours: str, names: list[str]) -> list[str]:
    """The float layers, and the others' layers of as many bits."""
    return [
        name
        for name in names
        if not name.startswith("bnbq") and (name in FLOATS or ("int8" in name) == ("int8" in ours))
    ]


# ------------------------------------------------------------------ arguments


def parser(doc: str, rounds: int = 5, only: bool = True) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="as far as there are cores")
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--quick", action="store_true", help="the fewest figures that say anything")
    if only:
        arguments.add_argument(
            "--only", nargs="+", default=[""], metavar="NAME", help="contenders by parts of their names"
        )
    where = arguments.add_mutually_exclusive_group()
    where.add_argument("--publish", action="store_true", help="append to what README.md shows, benchmarks/results")
    where.add_argument("--out", type=Path, metavar="FILE", help="append to this; default: in build/benchmarks")
    return arguments


def output(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.out or (RESULTS if arguments.publish else ROOT / "build" / "benchmarks") / name


def available(threads: list[int]) -> list[int]:
    return [count for count in threads if count <= cores()] or [1]


def parse_shape(text: str) -> tuple[int, int]:
    """out_features n = 4096, in_features k = 1024 from "4096x1024"."""
    n, k = map(int, text.split("x"))
    return n, k
