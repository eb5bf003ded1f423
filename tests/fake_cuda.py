"""CUDA tensors without a GPU: a build of the extension with emulated kernels, and torch's exchange API rewritten so that
CPU tensors look to it as if they lay on a GPU.

`extension()` builds once per source state into build/emulated-extension, with BNBQ_SANITIZE_EMULATOR with sanitizers. `FakeCuda` is the table that such a module
finds where it looks for torch's own: every tensor is on cuda:0 unless `place` has said otherwise, allocations are
counted and can be made to fail, and the streams that were asked for are kept.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from ctypes import (
    CFUNCTYPE,
    POINTER,
    PYFUNCTYPE,
    byref,
    c_bool,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import numpy as np
import torch

from emulated_cuda import COMPILER, ROOT, why_not

__all__ = ["FakeCuda", "extension", "load", "why_not"]

SANITIZE = os.environ.get("BNBQ_SANITIZE_EMULATOR", "")
FOLDER = ROOT / "build" / ("emulated-extension" + ("-sanitized" if SANITIZE else ""))
OBJECTS = ROOT / "build" / "sanitized-objects" if SANITIZE else FOLDER / "objects"  # check.py has built most of them
CPU, CUDA = 1, 2


@functools.cache
def extension() -> Path:
    """The extension with emulated kernels; two processes do not build it at once."""
    sources = sorted(p for folder in ("csrc", "cuda", "tests/cuda") for p in (ROOT / folder).rglob("*.[ch]*"))
    state = hashlib.sha256(f"{COMPILER} {SANITIZE}".encode())
    for path in [ROOT / "setup.py", *sources]:
        state.update(path.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    lib, stamp = FOLDER / "lib", FOLDER / "state"
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != state.hexdigest():
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", OBJECTS, "--build-lib", lib]
            settings = {"BNBQ_CUDA": "emulate", "CXX": COMPILER, "BNBQ_SANITIZE": SANITIZE, "LD_PRELOAD": ""}
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **settings})
            stamp.write_text(state.hexdigest())
    return next((lib / "bnbq").glob("_bnbq*.so"))


def load():
    """The emulated extension as a module of its own, which has seen no tensor yet."""
    spec = importlib.util.spec_from_file_location("bnbq._bnbq", extension())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ DLPack


class Device(ctypes.Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("device", Device), ("ndim", c_int32), ("dtype", DataType), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]


class Managed(ctypes.Structure):
    """DLManagedTensorVersioned"""


DELETER = CFUNCTYPE(None, POINTER(Managed))
Managed._fields_ = [("major", c_uint32), ("minor", c_uint32), ("context", c_void_p), ("deleter", DELETER), ("flags", c_uint64),
                    ("tensor", DLTensor)]
SET_ERROR = CFUNCTYPE(None, c_void_p, c_char_p, c_char_p)
ALLOCATE = CFUNCTYPE(c_int, POINTER(DLTensor), POINTER(POINTER(Managed)), c_void_p, SET_ERROR)
IMPORT = PYFUNCTYPE(c_int, POINTER(Managed), POINTER(c_void_p))
BORROW = PYFUNCTYPE(c_int, c_void_p, POINTER(DLTensor))
STREAM = PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))


class Table(ctypes.Structure):
    """DLExchangeApi"""

    _fields_ = [("major", c_uint32), ("minor", c_uint32), ("previous", c_void_p), ("allocate", ALLOCATE), ("export", c_void_p),
                ("import_managed", IMPORT), ("borrow", BORROW), ("current_stream", STREAM)]


NAME = b"dlpack_exchange_api"


def real_table() -> Table:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return Table.from_address(get(torch.Tensor.__dlpack_c_exchange_api__, NAME))


class FakeCuda:
    """torch's table, if tensors lay on GPUs.

    allocations: (device, bytes) of each. alive: how many have not been freed. fail_allocation: that one fails, counted
    from 0. streams: devices whose stream was asked for; that of device i is STREAM + i.
    """

    STREAM = 0x5000

    def __init__(self):
        self.real = real_table()
        self.places, self.blocks, self.allocations, self.streams = {}, {}, [], []
        self.fail_allocation = None
        self.table = Table(1, 0, None, ALLOCATE(self.allocate), self.real.export, IMPORT(self.import_managed),
                           BORROW(self.borrow), STREAM(self.current_stream))
        self.deleter = DELETER(self.free)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
        self.capsule = new(ctypes.addressof(self.table), NAME, None)

    @property
    def alive(self) -> int:
        return len(self.blocks)

    def place(self, tensor: torch.Tensor, device: str) -> torch.Tensor:
        kind, _, index = device.partition(":")
        self.places[tensor.data_ptr()] = (CPU if kind == "cpu" else CUDA, int(index or 0))
        return tensor

    def borrow(self, tensor, out) -> int:
        code = self.real.borrow(tensor, out)
        if code == 0:
            out[0].device = Device(*self.places.get(out[0].data, (CUDA, 0)))
        return code

    def allocate(self, prototype, out, context, set_error) -> int:
        wanted = prototype[0]
        shape = list(wanted.shape[:wanted.ndim])
        size = int(np.prod(shape)) * wanted.dtype.bits // 8
        turn = len(self.allocations)
        self.allocations.append(((wanted.device.type, wanted.device.id), size))
        if turn == self.fail_allocation:
            set_error(context, b"torch.OutOfMemoryError", b"CUDA out of memory. Tried to allocate it all")
            return -1
        block = np.full(size + 256, 0xFF, np.uint8)  # NaN, if somebody reads it
        sizes = (c_int64 * len(shape))(*shape)
        strides = (c_int64 * len(shape))(*[int(np.prod(shape[i + 1:])) for i in range(len(shape))])
        managed = Managed(1, 0, None, self.deleter, 0, DLTensor(
            block.ctypes.data + -block.ctypes.data % 256, wanted.device, len(shape), wanted.dtype, sizes, strides, 0))
        self.blocks[ctypes.addressof(managed)] = managed, block, sizes, strides
        self.places[managed.tensor.data] = wanted.device.type, wanted.device.id
        out[0] = ctypes.pointer(managed)
        return 0

    def free(self, managed) -> None:
        self.places.pop(managed[0].tensor.data, None)
        del self.blocks[ctypes.addressof(managed[0])]

    def import_managed(self, managed, out) -> int:
        managed[0].tensor.device = Device(CPU, 0)
        return self.real.import_managed(managed, out)

    def current_stream(self, kind, index, out) -> int:
        self.streams.append((kind, index))
        out[0] = self.STREAM + index
        return 0


# ------------------------------------------------------------------ the emulator


class Emulator:
    def __init__(self):
        self.library = ctypes.CDLL(str(extension()))
        self.library.emulator_launches.restype = c_int64

    @property
    def launches(self) -> int:
        return self.library.emulator_launches()

    def fail_next_launch(self, message: bytes) -> None:
        self.message = message  # the emulator does not copy it
        self.library.emulator_fail_next_launch(c_char_p(message))

    def last_call(self) -> tuple[int, int, bool]:
        """(device, stream, batch_invariant) of the latest launch."""
        device, stream, invariant = c_int(), c_void_p(), c_bool()
        self.library.emulator_last_call(byref(device), byref(stream), byref(invariant))
        return device.value, stream.value, invariant.value
