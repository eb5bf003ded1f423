"""The specification itself: published constants, and properties that need no other implementation."""

import hashlib

import numpy as np
import pytest

from bnbq import reference as ref
from cases import BLOCKSIZES, FORMATS, awkward_blocks

# Published NF4 values (QLoRA, appendix E) as fp32 bits.
NF4_BITS = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)


def test_nf4_codebook_is_the_published_one():
    assert tuple(ref.FORMATS["nf4"].codebook.view(np.uint32)) == NF4_BITS


def test_dynamic_map_is_bitsandbytes_map():
    digest = hashlib.sha1(ref.DYNAMIC_MAP.astype("<f4").tobytes()).hexdigest()
    assert digest == "cb07ba0d1557267d68103e0f7bc95af7a44d75f8"
    assert ref.DYNAMIC_MAP[127] == 0 and ref.DYNAMIC_MAP[255] == 1


def test_fp4_magnitudes():
    assert np.allclose(ref.FORMATS["fp4"].codebook[:8], [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    assert not np.signbit(ref.FORMATS["fp4"].codebook[8])


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_but_int4_zero_round_trips(name):
    fmt = ref.FORMATS[name]
    codes = [c for c in range(16) if not (name == "int4" and c == 0)]
    w = np.zeros(64, np.float32)
    w[: len(codes)] = fmt.codebook[codes]
    q, absmax = ref.quantize_4bit(w, name, 64)
    assert absmax.tolist() == [1.0]
    assert np.array_equal(ref.dequantize_4bit(q, absmax, (64,), name, 64), w)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_4bit_error_is_at_most_half_the_widest_gap(name, blocksize):
    fmt = ref.FORMATS[name]
    w = np.random.default_rng(0).standard_normal((3, blocksize)).astype(np.float32)
    q, absmax = ref.quantize_4bit(w, name, blocksize)
    error = np.abs(ref.dequantize_4bit(q, absmax, w.shape, name, blocksize) - w).max(1)
    assert (error <= np.diff(np.sort(fmt.codebook)).max() / 2 * absmax * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_the_lower_value(name):
    fmt = ref.FORMATS[name]
    w = np.zeros(64, np.float32)
    w[0] = 1
    inner = fmt.thresholds[np.abs(fmt.thresholds) <= 1]
    w[1:1 + inner.size] = inner
    q, absmax = ref.quantize_4bit(w, name, 64)
    got = ref.dequantize_4bit(q, absmax, (64,), name, 64)[1:1 + inner.size]
    below = [np.sort(fmt.codebook)[np.searchsorted(fmt.thresholds, t, "left")] for t in inner]
    assert got.tolist() == below and (got <= inner).all()


@pytest.mark.parametrize("name", FORMATS)
def test_awkward_blocks_stay_finite(name):
    blocks = awkward_blocks(64, ref.FORMATS[name].thresholds)
    q, absmax = ref.quantize_4bit(blocks, name, 64)
    assert np.isfinite(ref.dequantize_4bit(q, absmax, blocks.shape, name, 64)).all()
    assert not ref.dequantize_4bit(q, absmax, blocks.shape, name, 64)[:2].any()


def test_high_nibble_is_the_earlier_element():
    q, _ = ref.quantize_4bit(np.array([1, -1], np.float32), "nf4", 64)
    assert q.tolist() == [0xF0]


def test_odd_count_pads_with_the_code_of_zero():
    q, _ = ref.quantize_4bit(np.array([1, -1, 1], np.float32), "nf4", 64)
    assert q.tolist() == [0xF0, 0xF7]


def test_double_quantisation_is_within_one_step_and_exact_for_equal_scales():
    absmax = np.random.default_rng(0).uniform(0.5, 2, 1000).astype(np.float32)
    codes, absmax2, offset = ref.quantize_absmax(absmax)
    assert codes.dtype == np.uint8 and absmax2.shape == (4,) and offset.shape == (1,)
    step = np.repeat(absmax2, 256)[:1000] * np.diff(ref.DYNAMIC_MAP).max()
    assert (np.abs(ref.dequantize_absmax(codes, absmax2, offset) - absmax) <= step / 2 * 1.0001).all()
    same = np.full(300, 0.125, np.float32)
    assert np.array_equal(ref.dequantize_absmax(*ref.quantize_absmax(same)), same)


def test_int8_rows_round_half_to_even_and_zero_rows_stay_zero():
    w = np.array([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0]], np.float32)
    q, absmax = ref.quantize_8bit(w)
    assert q.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]] and absmax.tolist() == [127, 0]


def test_outlier_rules_differ_only_in_who_is_an_outlier():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    x[2, 7] = 40
    q, absmax = ref.quantize_8bit(rng.standard_normal((11, 96)).astype(np.float32))
    per_row, per_column = (ref.linear_8bit(x, q, absmax, outliers=rule)
                           for rule in (ref.outliers_per_row, ref.outliers_per_column))
    assert np.array_equal(per_row[2], per_column[2])
    assert not np.array_equal(per_row[0], per_column[0])
    assert np.array_equal(ref.linear_8bit(x, q, absmax), per_column), "the paper's rule is the default"
    assert np.array_equal(ref.linear_8bit(x[:1], q, absmax), per_row[:1])
    exact = x.astype(np.float64) @ ref.dequantize_8bit(q, absmax).astype(np.float64).T
    assert np.abs(per_row - exact).max() < 0.02 * np.abs(exact).max()


def test_non_finite_inputs_of_int8_reach_their_own_row_only():
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    x[2, 6] = np.inf
    q, absmax = ref.quantize_8bit(np.ones((4, 64), np.float32))
    for threshold in (0.0, 6.0):
        y = ref.linear_8bit(x, q, absmax, threshold=threshold)
        assert np.array_equal(y, ref.linear_8bit(x, q, absmax, threshold=threshold, outliers=ref.outliers_per_row), equal_nan=True)
        assert np.isfinite(y[0]).all() and np.isnan(y[1]).all() and np.isposinf(y[2]).all()


def test_non_finite_weights_are_refused_with_their_index():
    w = np.zeros((3, 64), np.float32)
    w[2, 5] = np.nan
    for quantize in (ref.quantize_4bit, ref.quantize_8bit):
        with pytest.raises(ValueError, match=r"nan at index \(2, 5\)"):
            quantize(w)


# ------------------------------------------------------------------ int8 activations


@pytest.mark.parametrize("name", FORMATS)
def test_int8_codebook_uses_the_range_and_is_nearest(name):
    codebook = ref.FORMATS[name].codebook
    codes, step = ref.codebook_int8(name)
    assert codes.max() == (112 if name == "int4" else 127) and codes.min() in (-127, -128)
    error = np.abs(codes * step - codebook)
    assert error.max() <= step * (0.5 + 1e-5)
    if name == "int4":
        assert error.max() < 1e-6


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_int8_activations_err_by_half_a_step_of_either_operand(name, blocksize):
    rng = np.random.default_rng(3)
    n, k, width = 7, 512, min(blocksize, 64)
    w, x = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal((5, k)).astype(np.float32)
    x[:, ::100] *= 40
    q, absmax = ref.quantize_4bit(w, name, blocksize)
    dense = np.abs(ref.dequantize_4bit(q, absmax, (n, k), name, blocksize)).astype(np.float64)
    half_x = np.repeat(np.abs(x.reshape(5, -1, width)).max(2), width, 1) / 254
    half_w = np.repeat(absmax.reshape(n, -1), blocksize, 1) * ref.codebook_int8(name)[1] / 2
    bound = half_x @ dense.T + np.abs(x) @ half_w.T + half_x @ half_w.T
    error = np.abs(ref.linear_4bit_int8(x, q, absmax, n, None, name, blocksize) - ref.linear_4bit(x, q, absmax, n, None, name, blocksize))
    assert (error <= bound * 1.001).all() and error.max() > bound.max() / 100


def test_int8_activations_that_are_not_finite_make_their_row_nan():
    x = np.ones((4, 128), np.float32)
    x[1, 5], x[2, 70] = np.nan, -np.inf
    q, absmax = ref.quantize_4bit(np.zeros((3, 128), np.float32), "nf4", 64)
    y = ref.linear_4bit_int8(x, q, absmax, 3)
    assert np.isnan(y[1:3]).all() and (y[[0, 3]] == 0).all()
