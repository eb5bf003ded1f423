"""``bnbq doctor`` on a GPU: each operation there against the same one on the CPU, on NumPy arrays."""

from __future__ import annotations

import numpy as np
import torch

from . import ops, reference
from .doctor import near, numbers, product, same
from .ops_library import DENSE_ROWS

ROWS = (1, 4, 16, 33, 128, 300, DENSE_ROWS)
"""m: one row, several, a tile of a tensor core product, its tails, many, and what goes to cuBLAS."""
SHAPES = ((72, 320), (200, 1024))
"""(n, k) of weights, with n that no tile divides."""
FLAT = (33, 100)
"""(n, k) whose blocks cross rows."""
DTYPES = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""What rounding weights and results to them may cost, of the magnitude."""


def self_test(device, rows=ROWS, shapes=SHAPES) -> list[dict]:
    """One result for each operation: device, operation, ok, error."""
    results = []
    for operation, check in CHECKS.items():
        result = {"device": str(device), "operation": operation, "ok": False, "error": None}
        try:
            for shape in (*shapes, FLAT):
                check(device, rows, *shape)
            result["ok"] = True
        except Exception as error:  # whatever is wrong is the result
            result["error"] = f"{type(error).__name__}: {error}"
        results.append(result)
    return results


def there(array, device):
    return None if array is None else torch.from_numpy(array).to(device)


def here(tensor) -> np.ndarray:
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()


def check_quantize_4bit(device, rows, n, k) -> None:
    for quant_type in reference.FORMATS:
        for double_quant in (False, True):
            w = numbers(n, k, scale=0.02)
            wanted = ops.quantize_4bit(w, quant_type, 64, double_quant)
            got = ops.quantize_4bit(there(w, device), quant_type, 64, double_quant)
            for name, a, b in zip(got._fields, got, wanted, strict=True):
                if b is not None:
                    same(here(a), b, f"{quant_type} {name}")


def packed_4bit(n, k, quant_type, double_quant, device):
    """The weight in float32, and its packed form here and there."""
    packed = ops.quantize_4bit(numbers(n, k, scale=0.02), quant_type, 64, double_quant)
    second = {"absmax2": packed.absmax2, "absmax_offset": packed.absmax_offset, "quant_type": quant_type}
    dense = ops.dequantize_4bit(packed.qweight, packed.absmax, (n, k), **second)
    moved = {**second, "absmax2": there(packed.absmax2, device), "absmax_offset": there(packed.absmax_offset, device)}
    return dense, (there(packed.qweight, device), there(packed.absmax, device)), moved


def check_dequantize_4bit(device, rows, n, k) -> None:
    for quant_type in reference.FORMATS:
        for double_quant in (False, True):
            wanted, packed, second = packed_4bit(n, k, quant_type, double_quant, device)
            for dtype in DTYPES:
                got = ops.dequantize_4bit(*packed, (n, k), dtype=dtype, **second)
                same(here(got), torch.from_numpy(wanted).to(dtype).float().numpy(), f"{quant_type} in {dtype}")


def check_absmax(device, rows, n, k) -> None:
    scales = abs(numbers(n * k)) + np.float32(0.01)
    wanted = ops.quantize_absmax(scales)
    got = ops.quantize_absmax(there(scales, device))
    for a, b in zip(got, wanted, strict=True):
        same(here(a), b, "scales quantised")
    same(here(ops.dequantize_absmax(*got)), ops.dequantize_absmax(*wanted), "scales")


def check_8bit(device, rows, n, k) -> None:
    w = numbers(n, k, scale=0.02)
    for blocksize in (0, 64):
        wanted = ops.quantize_8bit(w, blocksize)
        got = ops.quantize_8bit(there(w, device), blocksize)
        for a, b in zip(got, wanted, strict=True):
            same(here(a), b, f"int8, blocksize {blocksize}")
        dense = ops.dequantize_8bit(*wanted, blocksize=blocksize)
        same(here(ops.dequantize_8bit(*got, blocksize=blocksize)), dense, f"int8 dequantised, blocksize {blocksize}")


def check_linear4bit(device, rows, n, k) -> None:
    for quant_type, double_quant in (("nf4", False), ("fp4", True), ("int4", False)):
        dense, packed, second = packed_4bit(n, k, quant_type, double_quant, device)
        bias = numbers(n)
        for m in rows:
            x = numbers(m, k)
            wanted, size = product(x, dense.T) + bias, product(abs(x), abs(dense).T) + abs(bias)
            for dtype, rounding in DTYPES.items():
                y = ops.linear4bit(there(x, device).to(dtype), *packed, n, there(bias, device), **second)
                near(here(y), wanted, size, (k + 16) * 2.0**-24 + rounding, f"{quant_type} in {dtype}, m = {m}")


def check_linear4bit_backward(device, rows, n, k) -> None:
    dense, packed, second = packed_4bit(n, k, "nf4", False, device)
    for m in rows:
        gy = numbers(m, n)
        wanted, size = product(gy, dense), product(abs(gy), abs(dense))
        for dtype, rounding in DTYPES.items():
            gx = ops.linear4bit_backward(there(gy, device).to(dtype), *packed, k, **second)
            near(here(gx), wanted, size, (n + 16) * 2.0**-24 + rounding, f"gradient in {dtype}, m = {m}")


def check_linear8bitlt(device, rows, n, k) -> None:
    for blocksize in (0, 64):
        qweight, absmax = ops.quantize_8bit(numbers(n, k, scale=0.02), blocksize)
        moved = there(qweight, device), there(absmax, device)
        dense = ops.dequantize_8bit(qweight, absmax, blocksize=blocksize)
        for m in rows:
            x = numbers(m, k)
            x[::3, 7] = 9.0  # outliers in some rows
            for threshold in (0.0, 6.0):
                settings = {"threshold": threshold, "blocksize": blocksize}
                wanted, size = ops.linear8bitlt(x, qweight, absmax, **settings), product(abs(x), abs(dense).T)
                for dtype, rounding in DTYPES.items():
                    y = ops.linear8bitlt(there(x, device).to(dtype), *moved, **settings)
                    near(here(y), wanted, size, 2.0**-19 + rounding, f"int8 in {dtype}, m = {m}, {settings}")


def check_linear8bitlt_backward(device, rows, n, k) -> None:
    qweight, absmax = ops.quantize_8bit(numbers(n, k, scale=0.02))
    moved = there(qweight, device), there(absmax, device)
    dense = ops.dequantize_8bit(qweight, absmax)
    for m in rows:
        gy = numbers(m, n)
        wanted, size = product(gy, dense), product(abs(gy), abs(dense))
        for dtype, rounding in DTYPES.items():
            gx = ops.linear8bitlt_backward(there(gy, device).to(dtype), *moved)
            near(here(gx), wanted, size, (n + 16) * 2.0**-24 + rounding, f"gradient in {dtype}, m = {m}")


CHECKS = {
    "quantize_4bit": check_quantize_4bit,
    "dequantize_4bit": check_dequantize_4bit,
    "quantize_absmax": check_absmax,
    "quantize_8bit": check_8bit,
    "linear4bit": check_linear4bit,
    "linear4bit_backward": check_linear4bit_backward,
    "linear8bitlt": check_linear8bitlt,
    "linear8bitlt_backward": check_linear8bitlt_backward,
}
