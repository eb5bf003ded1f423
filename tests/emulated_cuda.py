"""The kernels of cuda/ on the CPU: built with the emulator of tests/cuda, called through ctypes on NumPy arrays.

`library()` compiles once per source state into build/emulated (with BNBQ_SANITIZE also there, for a process that
has the sanitizer's runtime preloaded). Arrays are float32, or uint16 / float16 holding bfloat16 / float16.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from ctypes import (
    POINTER,
    byref,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-Wno-missing-field-initializers", "-DBNBQ_EMULATE", "-I", "csrc", "-I", "cuda", "-I", "tests/cuda"]
TRAPS = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # what a GPU refuses and a CPU does not
MAX_DIMS = 8
F32, BF16, F16 = range(3)
OK, NO_MEMORY, NOT_FINITE, DEVICE_ERROR = range(4)


class Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int), ("ndim", c_int), ("shape", c_int64 * MAX_DIMS),
                ("strides", c_int64 * MAX_DIMS)]


class Format(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("codebook", c_float * 16), ("thresholds", c_float * 15), ("order", c_uint8 * 16)]


class Absmax(ctypes.Structure):
    _fields_ = [("absmax", c_void_p), ("codes", c_void_p), ("absmax2", c_void_p), ("offset", c_void_p)]


class Weight4(ctypes.Structure):
    _fields_ = [("qweight", c_void_p), ("absmax", Absmax), ("format", POINTER(Format)), ("n", c_int64), ("k", c_int64),
                ("blocksize", c_int64)]


class Weight8(ctypes.Structure):
    _fields_ = [("qweight", c_void_p), ("absmax", c_void_p), ("n", c_int64), ("k", c_int64), ("blocksize", c_int64)]


ALLOCATE = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)


class Call(ctypes.Structure):
    _fields_ = [("device", c_int), ("stream", c_void_p), ("batch_invariant", c_bool), ("allocate", ALLOCATE), ("owner", c_void_p), ("error", c_char * 256)]


class DeviceError(RuntimeError):
    pass


def why_not() -> str | None:
    """What is missing to build the emulator, or None."""
    return None if shutil.which(COMPILER) else f"no {COMPILER}"


@functools.cache
def library() -> ctypes.CDLL:
    sanitize = os.environ.get("BNBQ_SANITIZE_EMULATOR", "")
    sources = sorted((ROOT / "cuda").glob("*.cu")) + [ROOT / "tests/cuda/emulator.cpp", ROOT / "csrc/formats.c"]
    headers = [p for folder in ("cuda", "csrc", "tests/cuda") for p in (ROOT / folder).glob("*.*h")]
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else TRAPS
    flags = [*FLAGS, *checks]
    target = ROOT / "build" / ("emulated-sanitized" if sanitize else "emulated")
    target.mkdir(parents=True, exist_ok=True)
    state = hashlib.sha256("\0".join([COMPILER, *flags]).encode())
    for path in [*sources, *sorted(headers)]:
        state.update(path.read_bytes())
    shared = target / f"kernels-{state.hexdigest()[:16]}.so"
    if not shared.exists():
        running = []
        for source in sources:  # side by side
            kind = ["-x", "c++"] if source.suffix == ".cu" else []
            own = [f for f in flags if f != "-std=c++17"] if source.suffix == ".c" else flags
            out = target / f"{source.stem}-{os.getpid()}.o"
            command = [COMPILER if kind or source.suffix == ".cpp" else os.environ.get("CC", "gcc"), *own, *kind, "-c", source, "-o", out]
            running.append((subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True), out))
        errors = "".join(process.communicate()[1] for process, _ in running)
        if any(process.returncode for process, _ in running):
            raise RuntimeError(errors)
        objects = [out for _, out in running]
        temporary = shared.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, "-shared", *flags, *objects, "-o", temporary], check=True, cwd=ROOT)
        for out in objects:
            out.unlink()
        temporary.rename(shared)
    return ctypes.CDLL(str(shared))


def set_order(order: int) -> None:
    """The order in which threads run: 0 ascending, 1 descending, otherwise shuffled by this seed."""
    library().emulator_set_order(c_uint32(order))


def set_device(capability: int = 90, processors: int = 4, shared_limit: int = 227 * 1024) -> None:
    library().emulator_set_device(capability, processors, c_size_t(shared_limit))


def launches() -> int:
    library().emulator_launches.restype = c_int64
    return library().emulator_launches()


# ------------------------------------------------------------------ arguments


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> its bfloat16 bits (uint16), rounded to nearest even; finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def dtype_of(x: np.ndarray) -> int:
    return {np.dtype(np.float32): F32, np.dtype(np.uint16): BF16, np.dtype(np.float16): F16}[x.dtype]


def tensor(x: np.ndarray) -> Tensor:
    """Of any strides."""
    strides = [s // x.itemsize for s in x.strides]
    return Tensor(x.ctypes.data, dtype_of(x), x.ndim, (c_int64 * MAX_DIMS)(*x.shape), (c_int64 * MAX_DIMS)(*strides))


def find_format(name: str):
    find = library().bnbq_find_format
    find.restype = POINTER(Format)
    return find(name.encode())


def pointer(x: np.ndarray | None):
    return None if x is None else x.ctypes.data


def scales(absmax, absmax2=None, offset=None) -> Absmax:
    if absmax2 is None:
        return Absmax(pointer(absmax), None, None, None)
    return Absmax(None, pointer(absmax), pointer(absmax2), pointer(offset))


def weight4(packed, quant_type: str, blocksize: int, n: int, k: int) -> Weight4:
    """packed: what `bnbq.ops.quantize_4bit` returns. Keep it alive."""
    qweight, absmax, *second = packed
    return Weight4(pointer(qweight), scales(absmax, *second), find_format(quant_type), n, k, blocksize)


def weight8(qweight, absmax, blocksize: int = 0) -> Weight8:
    return Weight8(pointer(qweight), pointer(absmax), *qweight.shape, blocksize)


def call(name: str, *arguments, batch_invariant: bool = False, allowed: int | None = None) -> int:
    """bnbq_cuda_<name>(call, *arguments). Working space is a heap block per allocation, at most `allowed` of them."""
    blocks = []

    def allocate(owner, size):
        if allowed is not None and len(blocks) >= allowed:
            return None
        blocks.append(np.full(size + 256, 0xFF, np.uint8))
        return blocks[-1].ctypes.data + -blocks[-1].ctypes.data % 256

    state = Call(0, None, batch_invariant, ALLOCATE(allocate), None, b"")
    function = getattr(library(), f"bnbq_cuda_{name}")
    status = function(byref(state), *[byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments])
    if status == DEVICE_ERROR:
        raise DeviceError(state.error.decode())
    return status


