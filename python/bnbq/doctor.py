"""``bnbq doctor``: what is installed, which kernels run and why, and whether they are right.

The self test runs every kernel family on every instruction set of this CPU: a small weight is
quantised, multiplied and compared with reference.py. It needs NumPy only; torch is imported, where it
is installed, because its presence decides which threads the kernels use. Where it sees a GPU and this is
a build with CUDA, every operation runs there too (doctor_cuda.py).
"""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from functools import cache
from importlib import metadata

import numpy as np

from . import reference

PACKAGES = ("bnbq", "numpy", "torch", "transformers", "accelerate", "peft", "safetensors", "gguf", "bitsandbytes")
SHAPES = ((3, 5, 128), (17, 40, 320), (64, 33, 256))
"""(m, n, k): a few rows, a tile's worth and a prefill, with n that no kernel divides."""


def main(arguments) -> int:
    """Run ``bnbq doctor``; 1 if a kernel is wrong or the extension is missing."""
    facts = examine()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print(describe(facts))
    return 0 if facts["ok"] else 1


def examine() -> dict:
    """Everything that ``bnbq doctor`` says, as one JSON-able dict."""
    started = time.perf_counter()
    facts = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "packages": versions(),
    }
    if importlib.util.find_spec("torch") is not None:
        facts["torch"] = torch_facts()
    try:
        from . import _bnbq
    except ImportError as error:
        return {**facts, "ok": False, "extension": f"cannot be imported: {error}"}
    facts.update(
        extension=getattr(_bnbq, "__file__", "built in"),
        build=_bnbq.build_info(),
        cpu=cpu_name(),
        cpu_features=list(_bnbq.cpu_features()),
        isas=list(_bnbq.isas()),
        isa=_bnbq.isa(),
        kernels=explain(_bnbq.rows()),
        formats=list(_bnbq.formats()),
        threads={"backend": _bnbq.thread_backend(), "count": _bnbq.thread_count()},
    )
    facts["self_test"] = self_test(_bnbq)
    facts["gpu_self_test"] = gpu_self_test(facts) if facts["build"]["cuda"] else []
    facts["ok"] = all(test["ok"] for test in [*facts["self_test"], *facts["gpu_self_test"]])
    facts["seconds"] = round(time.perf_counter() - started, 2)
    return facts


def versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def torch_facts() -> dict:
    try:
        import torch
    except Exception as error:  # a broken torch must not hide the rest
        return {"error": f"{type(error).__name__}: {error}"}
    facts = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpus"] = [f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}" for gpu in found]
    return facts


def cpu_name() -> str:
    """The CPU's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def explain(rows) -> list[dict]:
    """The rows of the kernel table (slowest first), and why each is used or not."""
    result, passed = [], set()  # families whose row in use has been seen
    for row in rows:
        missing = list(row["missing"])
        if row["in_use"]:
            why = "in use"
            passed.add(row["family"])
        elif missing:
            why = f"not used: this CPU lacks {', '.join(missing)}"
        else:
            why = "not used: capped by BNBQ_ISA or set_isa" if row["family"] in passed else "not used: a faster one is"
        result.append(
            {
                "family": row["family"],
                "isa": row["isa"],
                "level": row["level"],
                "needs": list(row["needs"]),
                "missing": missing,
                "in_use": bool(row["in_use"]),
                "why": why,
            }
        )
    return result


# ------------------------------------------------------------------ self test


def self_test(_bnbq) -> list[dict]:
    """One result for each instruction set and family: isa, family, kernel, ok, error. What was selected stays so."""
    results, chosen = [], _bnbq.isa()
    try:
        for isa in _bnbq.isas():
            for family, check in (("edge", check_edge), ("q4", check_q4), ("s8", check_s8), ("w4a8", check_w4a8)):
                result = {"isa": isa, "family": family, "kernel": None, "ok": False, "error": None}
                try:
                    _bnbq.set_isa(isa)
                    result["kernel"] = next(
                        (row["isa"] for row in _bnbq.rows() if row["family"] == family and row["in_use"]), None
                    )
                    check(_bnbq)
                    result["ok"] = True
                except Exception as error:  # whatever is wrong is the result
                    result["error"] = f"{type(error).__name__}: {error}"
                results.append(result)
    finally:
        _bnbq.set_isa(chosen)
    return results


def gpu_self_test(facts: dict) -> list[dict]:
    """One result for each GPU that torch sees and operation: device, operation, ok, error."""
    gpus = facts.get("torch", {}).get("gpus", [])
    if not gpus:
        return []
    from . import doctor_cuda

    return [test for i in range(len(gpus)) for test in doctor_cuda.self_test(f"cuda:{i}")]


def numbers(*shape, scale: float = 1.0) -> np.ndarray:
    """Fixed values that look random, f32[shape], in [-2, 2] * scale; exact in bf16 but for the scale."""
    count = int(np.prod(shape))
    return (
        (np.arange(1, count + 1, dtype=np.int64) * 2654435761 % 1009 % 257 - 128).astype(np.float32)
        / 64
        * np.float32(scale)
    ).reshape(shape)


def same(got, wanted, what: str) -> None:
    got, wanted = got.ravel(), wanted.ravel()
    bad = np.flatnonzero(got != wanted)
    if bad.size:
        raise ArithmeticError(
            f"{what}: {bad.size} of {got.size} differ, the first at {bad[0]}: {got[bad[0]]}, expected {wanted[bad[0]]}"
        )


def near(got, wanted, magnitude, bound: float, what: str) -> None:
    """|got - wanted| against the product of absolute values: an fp32 sum of k terms is off by less than k ulp of it."""
    error = np.abs(got.astype(np.float64) - wanted) / np.maximum(magnitude, 1e-30)
    if not np.all(error <= bound):
        raise ArithmeticError(f"{what}: error {np.nanmax(error):.2e} of the magnitude, at most {bound:.2e} is right")


def check_edge(_bnbq) -> None:
    """fp16 in and out: the widened scales of a product with the identity are exact."""
    k = 64
    x = numbers(3, k).astype(np.float16)
    q, a, y = np.empty((k, k), np.int8), np.empty(k, np.float32), np.empty((3, k), np.float16)
    _bnbq.quantize_8bit(np.eye(k, dtype=np.float32), q, a, 0)
    _bnbq.linear8bitlt(x, q, a, None, y, 1e-6, 0)  # all outliers: each y is one product with 1
    same(y, x, "fp16 through an identity")


@cache
def case_q4(quant_type: str, m: int, n: int, k: int):
    """Inputs and what reference.py makes of them; computed once for all instruction sets."""
    x, w, gy = numbers(m, k), numbers(n, k, scale=0.02), numbers(m, n)
    packed, absmax = reference.quantize_4bit(w, quant_type, 64)
    dense = reference.dequantize_4bit(packed, absmax, (n, k), quant_type, 64)
    return (
        x,
        w,
        gy,
        packed,
        absmax,
        dense,
        product(x, dense.T),
        product(abs(x), abs(dense).T),
        product(gy, dense),
        product(abs(gy), abs(dense)),
    )


@cache
def case_s8(m: int, n: int, k: int):
    x, w, gy = numbers(m, k), numbers(n, k, scale=0.02), numbers(m, n)
    x[::3, 7] = 9.0  # outliers in some rows
    codes, absmax = reference.quantize_8bit(w)
    dense = reference.dequantize_8bit(codes, absmax)
    return (
        x,
        w,
        gy,
        codes,
        absmax,
        reference.linear_8bit(x, codes, absmax),
        product(abs(x), abs(dense).T),
        product(gy, dense),
        product(abs(gy), abs(dense)),
    )


def product(a, b) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64)


def check_q4(_bnbq) -> None:
    """Quantise, dequantise, multiply and go backward in each 4-bit format; raises what is wrong."""
    for quant_type in reference.FORMATS:
        for m, n, k in SHAPES:
            x, w, gy, packed, absmax, exact, wanted, size, back, back_size = case_q4(quant_type, m, n, k)
            q, a, dense = np.empty((n, k // 2), np.uint8), np.empty((n, k // 64), np.float32), np.empty_like(w)
            _bnbq.quantize_4bit(w, q, a, quant_type, 64)
            same(q, packed, f"{quant_type} codes")
            same(a, absmax, f"{quant_type} scales")
            _bnbq.dequantize_4bit(q, a, None, None, dense, quant_type, 64)
            same(dense, exact, f"{quant_type} dequantised")
            for rows in (1, m):
                for compute, bound in (("float32", (k + 16) * 2.0**-24), ("bfloat16", (k + 16) * 2.0**-24 + 2.0**-8)):
                    y = np.empty((rows, n), np.float32)
                    _bnbq.linear4bit(x[:rows], q, a, None, None, None, y, quant_type, 64, compute, None)
                    near(y, wanted[:rows], size[:rows], bound, f"{quant_type} product in {compute}, m = {rows}")
            gx = np.empty((m, k), np.float32)
            _bnbq.linear4bit_backward(gy, q, a, None, None, gx, quant_type, 64, "float32")
            near(gx, back, back_size, (n + 16) * 2.0**-24, f"{quant_type} backward")


def check_w4a8(_bnbq) -> None:
    """Multiply int8 activations with each 4-bit format; raises unless every bit is right."""
    for quant_type in reference.FORMATS:
        for m, n, k in SHAPES:
            x, _, _, packed, absmax, *_ = case_q4(quant_type, m, n, k)
            packed, absmax = packed.reshape(n, -1), absmax.reshape(n, -1)
            wanted = reference.linear_4bit_int8(x, packed, absmax, n, None, quant_type, 64)
            for rows in (1, m):
                y = np.empty((rows, n), np.float32)
                _bnbq.linear4bit(x[:rows], packed, absmax, None, None, None, y, quant_type, 64, None, "int8")
                same(y, wanted[:rows], f"{quant_type} product of int8 activations, m = {rows}")


def check_s8(_bnbq) -> None:
    """Quantise, multiply (with outliers) and go backward in int8; raises what is wrong."""
    for m, n, k in SHAPES:
        x, w, gy, codes, absmax, wanted, size, back, back_size = case_s8(m, n, k)
        q, a = np.empty((n, k), np.int8), np.empty(n, np.float32)
        _bnbq.quantize_8bit(w, q, a, 0)
        same(q, codes, "int8 codes")
        same(a, absmax, "int8 scales")
        for rows in (1, m):
            y = np.empty((rows, n), np.float32)
            _bnbq.linear8bitlt(x[:rows], q, a, None, y, 6.0, 0)
            near(y, wanted[:rows], size[:rows], 16 * 2.0**-24, f"int8 product, m = {rows}")
        gx = np.empty((m, k), np.float32)
        _bnbq.linear8bitlt_backward(gy, q, a, gx, 0)
        near(gx, back, back_size, (n + 16) * 2.0**-24, "int8 backward")


# ------------------------------------------------------------------ text


def describe(facts: dict) -> str:
    """The facts for people."""
    lines = [
        f"Python {facts['python']} ({facts['implementation']}), {facts['system']}",
        ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["packages"].items()),
    ]
    if "error" in facts.get("torch", {}):
        lines.append(f"torch cannot be imported: {facts['torch']['error']}")
    if not isinstance(facts.get("build"), dict):
        return "\n".join([*lines, f"extension: {facts['extension']}", "FAILED"])
    build = facts["build"]
    lines += [
        f"extension {facts['extension']}",
        "built with " + ", ".join(f"{key} {value}" for key, value in build.items() if not key.startswith("cuda")),
        f"CUDA: {'toolkit {cuda}, {cuda_archs}'.format(**build) if build['cuda'] else 'no kernels in this build'}; "
        f"GPUs: {'; '.join(facts.get('torch', {}).get('gpus', [])) or 'none found'}",
        f"CPU: {facts['cpu']}",
        f"     {' '.join(facts['cpu_features']) or 'no features beyond the baseline'}",
        f"threads: {facts['threads']['count']} ({facts['threads']['backend']})",
        "",
        f"kernels ({facts['isa']} selected; BNBQ_ISA chooses another of: {', '.join(facts['isas'])})",
    ]
    lines += [f"  {row['family']:5} {row['isa']:12} {row['why']}" for row in facts["kernels"]]
    lines += ["", "self test"]
    lines += [
        f"  {test['family']:5} {test['kernel'] or '?':12} {'ok' if test['ok'] else 'FAILED: ' + test['error']}"
        for test in facts["self_test"]
    ]
    if facts["gpu_self_test"]:
        lines += ["", "self test on the GPU, against the CPU"]
    lines += [
        f"  {test['device']:7} {test['operation']:22} {'ok' if test['ok'] else 'FAILED: ' + test['error']}"
        for test in facts["gpu_self_test"]
    ]
    lines.append(f"\n{'all is well' if facts['ok'] else 'FAILED'} ({facts['seconds']} s)")
    return "\n".join(lines)
