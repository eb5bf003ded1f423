"""Golden vectors: the specification still writes them, and so does every instruction set."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from bnbq import ops
from cases import FORMATS, formula
from golden.make import vectors

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def hexed(array: np.ndarray) -> str:
    return np.ascontiguousarray(array).tobytes().hex()


def test_reference_writes_the_stored_vectors():
    for name, content in vectors().items():
        assert json.loads((GOLDEN / name).read_text()) == content, f"{name} differs from reference.py"


@pytest.mark.parametrize("name", FORMATS)
def test_4bit_bytes_on_every_isa(name, isa):
    stored = load(name)
    w = formula(**stored["input"])
    for row in stored["vectors"]:
        packed = ops.quantize_4bit(w, name, row["blocksize"])
        assert hexed(packed.qweight) == row["qweight"] and hexed(packed.absmax) == row["absmax"], row["blocksize"]
        double = ops.quantize_4bit(w, name, row["blocksize"], double_quant=True)
        assert hexed(double.qweight) == row["qweight"]
        assert hexed(double.absmax) == row["absmax_codes"] and hexed(double.absmax2) == row["absmax2"]
        assert hexed(double.absmax_offset) == row["offset"]
        dense = ops.dequantize_4bit(packed.qweight, packed.absmax, w.shape, quant_type=name, blocksize=row["blocksize"])
        assert zlib.crc32(dense.tobytes()) == row["dense_crc32"]


def test_int8_bytes_on_every_isa(isa):
    stored = load("int8")
    shape = stored["input"]["shape"]
    w = formula(shape[0] * shape[1], stored["input"]["seed"]).reshape(shape)
    for row in stored["vectors"]:
        q, absmax = ops.quantize_8bit(w, row["blocksize"])
        assert hexed(q) == row["qweight"] and hexed(absmax) == row["absmax"], row["blocksize"]
