"""Bits that must not move: with the thread count ever, with the batch when that is asked for."""

import numpy as np
import pytest
import torch

from bnbq import _bnbq, ops
from bnbq import reference as ref
from cases import activations, weight

N, K = 200, 320
BATCHES = (*range(1, 20), 31, 32, 33, 63, 64, 65, 128, 255, 256, 257)


def products():
    parts = ops.quantize_4bit(torch.from_numpy(weight(N, K)))
    flat = ops.quantize_4bit(torch.from_numpy(weight(N, K - 1)))
    q, absmax = (torch.from_numpy(a) for a in ref.quantize_8bit(weight(N, K)))
    return {
        "linear4bit": lambda x: ops.linear4bit(x, parts.qweight, parts.absmax, N),
        "linear4bit int8": lambda x: ops.linear4bit(x, parts.qweight, parts.absmax, N, activations="int8"),
        "linear4bit flat": lambda x: ops.linear4bit(x[:, 1:], flat.qweight, flat.absmax, N),
        "linear4bit backward": lambda x: ops.linear4bit_backward(x[:, :N], parts.qweight, parts.absmax, K),
        "linear8bitlt": lambda x: ops.linear8bitlt(x, q, absmax),
        "linear8bitlt backward": lambda x: ops.linear8bitlt_backward(x[:, :N], q, absmax),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", products())
def test_thread_count_never_changes_a_bit(name, dtype, isa):
    product = products()[name]
    x = torch.from_numpy(activations(530, K, outliers=4)).to(dtype)
    results = []
    for threads in (1, 2, 3, 5):
        _bnbq.set_thread_limit(threads)
        results.append(product(x))
    _bnbq.set_thread_limit(0)
    assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", products())
def test_batch_never_changes_a_bit_when_invariant(name, dtype, isa, batch_invariant):
    """A row alone, in any batch size, in any position."""
    product = products()[name]
    x = torch.from_numpy(activations(257, K, outliers=4)).to(dtype)
    alone = torch.cat([product(x[i:i + 1]) for i in range(257)])
    for m in BATCHES:
        assert torch.equal(product(x[:m]), alone[:m]), m
        assert torch.equal(product(x[257 - m:]), alone[257 - m:]), m


@pytest.mark.parametrize("name", [name for name in products() if name != "linear8bitlt"])
def test_neighbours_never_change_a_row(name, isa):
    """Without the flag a row may depend on m, never on the values beside it. (LLM.int8() forward is the
    exception: its outlier columns are those of the batch, as in the paper.)"""
    product = products()[name]
    for m in (2, 16, 40):
        x = torch.from_numpy(activations(m, K, outliers=4))
        other = torch.from_numpy(activations(m, K, seed=9, outliers=9)) * 100
        other[m // 2] = x[m // 2]
        assert torch.equal(product(x)[m // 2], product(other)[m // 2])


def test_batch_never_changes_a_bit_of_int8_activations(isa):
    product = products()["linear4bit int8"]
    x = torch.from_numpy(activations(257, K, outliers=4))
    alone = torch.cat([product(x[i:i + 1]) for i in range(257)])
    assert all(torch.equal(product(x[257 - m:]), alone[257 - m:]) for m in BATCHES)


def test_setting_is_process_wide_and_readable():
    assert _bnbq.batch_invariant() is False
    _bnbq.set_batch_invariant(True)
    try:
        assert _bnbq.batch_invariant() is True
    finally:
        _bnbq.set_batch_invariant(False)


def test_int8_outliers_of_a_neighbour_do_not_leak_when_invariant(batch_invariant):
    q, absmax = ref.quantize_8bit(weight(50, 96))
    x = activations(6, 96)
    y = ops.linear8bitlt(x, q, absmax)
    x[5, :30] = 50
    assert np.array_equal(ops.linear8bitlt(x, q, absmax)[:5], y[:5])


def test_int8_without_outliers_never_depends_on_neighbours():
    q, absmax = ref.quantize_8bit(weight(50, 96))
    x = activations(6, 96)
    y = ops.linear8bitlt(x, q, absmax, threshold=0.0)
    x[5, :30] = 50
    assert np.array_equal(ops.linear8bitlt(x, q, absmax, threshold=0.0)[:5], y[:5])
