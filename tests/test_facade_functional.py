"""`bnbq.bitsandbytes.functional`, its products and its operators: bitsandbytes' arguments and shapes on bnbq's bytes."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bnbq.bitsandbytes as bnb  # noqa: E402
import cases  # noqa: E402
from bnbq import ops, reference  # noqa: E402

F = bnb.functional
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def weight(*shape, dtype=torch.float32):
    return torch.from_numpy(cases.weight(*shape)).to(dtype)


# ------------------------------------------------------------------ 4 bit


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_and_values_are_the_cores(quant_type, storage, dtype, double_quant):
    w = weight(16, 192, dtype=dtype)
    packed, state = F.quantize_4bit(w, quant_type=quant_type, quant_storage=storage, compress_statistics=double_quant)
    core = ops.quantize_4bit(w, quant_type, 64, double_quant)
    assert (packed.dtype, packed.shape) == (storage, (16 * 192 // 2 // storage.itemsize, 1))
    assert torch.equal(packed.view(torch.uint8).flatten(), core.qweight.flatten())
    assert torch.equal(state.absmax, core.absmax.flatten()) and state.nested == double_quant
    assert (state.shape, state.dtype, state.quant_type, state.blocksize) == (w.shape, dtype, quant_type, 64)
    wanted = ops.dequantize_4bit(*core[:2], w.shape, absmax2=core.absmax2, absmax_offset=core.absmax_offset,
                                 quant_type=quant_type, dtype=dtype)
    assert torch.equal(F.dequantize_4bit(packed, state), wanted)
    out = torch.empty_like(w)
    assert F.dequantize_4bit(packed, state, out=out) is out and torch.equal(out, wanted)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), wanted.t())  # handed over transposed


@pytest.mark.parametrize("shape", [(5,), (1, 2), (3, 33), (2, 4, 96), (7, 63)], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_any_shape_comes_back(shape, blocksize):
    """Where rows end inside a block bitsandbytes' AVX-512 decoder errs, and it transposes (1, 2)."""
    w = weight(*shape) if len(shape) > 1 else weight(1, *shape)[0]
    packed, state = F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    wanted = F.dequantize_4bit(packed, state)
    assert wanted.shape == w.shape and state.absmax.shape == (-(-w.numel() // blocksize),)
    assert (wanted - w).abs().max() < 0.2 * w.abs().max()


def test_defaults_and_short_names():
    w = weight(8, 64)
    packed, state = F.quantize_4bit(w)
    assert (state.quant_type, state.blocksize, state.nested) == ("fp4", 64, False)
    for quantize, dequantize, name in [(F.quantize_fp4, F.dequantize_fp4, "fp4"), (F.quantize_nf4, F.dequantize_nf4, "nf4")]:
        short, short_state = quantize(w)
        assert short_state == F.quantize_4bit(w, quant_type=name)[1] and short_state.quant_type == name
        assert torch.equal(dequantize(short, short_state), F.dequantize_4bit(short, short_state))
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    again, filled = F.quantize_4bit(w, absmax=absmax, out=out)
    assert again is out and filled.absmax is absmax and torch.equal(out, packed) and torch.equal(absmax, state.absmax)
    dense = torch.empty(8, 64)
    F.dequantize_4bit(packed, absmax=absmax, out=dense)  # no state: fp4 in blocks of 64, shape and dtype of out
    assert torch.equal(dense, F.dequantize_4bit(packed, state))


def test_double_quantisation_of_another_kind_is_decoded():
    """Scales in a code or a block that the C core does not hold: what bitsandbytes would compute, bit for bit."""
    w = weight(64, 256)
    packed, state = F.quantize_4bit(w)
    code = torch.linspace(-1, 1, 256)
    codes, state2 = F.quantize_blockwise(state.absmax - 1, code=code, blocksize=128)
    other = F.QuantState(codes, w.shape, state.code, 64, "fp4", w.dtype, torch.tensor(1.0), state2)
    scales = code[codes.long()] * state2.absmax.repeat_interleave(128)[: codes.numel()] + 1
    plain = F.QuantState(scales, w.shape, state.code, 64, "fp4", w.dtype)
    assert torch.equal(F.dequantize_4bit(packed, other), F.dequantize_4bit(packed, plain))
    x = torch.randn(3, 256)
    assert torch.equal(bnb.matmul_4bit(x, packed, other), bnb.matmul_4bit(x, packed, plain))
    state2.code = F.create_dynamic_map()  # a new code is looked at afresh
    assert not torch.equal(F.dequantize_4bit(packed, other), F.dequantize_4bit(packed, plain))


@pytest.mark.parametrize("call, message", [
    (lambda w: F.quantize_4bit(w, blocksize=48), "blocksize is 48"),
    (lambda w: F.quantize_4bit(w, quant_type="int4"), "quant_type is 'int4'"),
    (lambda w: F.quantize_4bit(w.double()), "float64"),
    (lambda w: F.quantize_4bit(w[:1, :3], quant_storage=torch.float32), "2 packed bytes cannot be stored as torch.float32"),
    (lambda w: F.quantize_4bit(w * float("nan")), "nan at index"),
    (lambda w: F.dequantize_4bit(F.quantize_4bit(w)[0]), "wanted a quant_state"),
    (lambda w: F.dequantize_4bit(F.quantize_4bit(w)[0][:-1], F.quantize_4bit(w)[1]), "255 bytes and 8 scales, wanted 256 and 8"),
    (lambda w: F.gemv_4bit(w, w), "gemv_4bit: wanted the state"),
    (lambda w: bnb.matmul_4bit(w, w, None), "wanted the quant_state"),
    (lambda w: bnb.matmul_4bit(w, *F.quantize_4bit(w.view(2, 4, 64))), r"\[2, 4, 64\], wanted \[n, k\]"),
    (lambda w: bnb.matmul_4bit(w[:, :50], *F.quantize_4bit(w)), "50 columns"),
    (lambda w: F.int8_double_quant(w, out_row=w), "out_row cannot be given"),
    (lambda w: F.int8_linear_matmul(w, w), "wanted int8"),
    (lambda w: F.quantize_blockwise(w.double()), "float64"),
    (lambda w: F.quantize_blockwise(w, blocksize=0), "blocksize is 0"),
    (lambda w: F.quantize_blockwise(w, code=torch.zeros(300)), "at most 256 floats"),
    (lambda w: F.quantize_blockwise(w * float("inf")), "at flat index 0"),
    (lambda w: F.dequantize_blockwise(w.byte()), "wanted a quant_state or absmax"),
    (lambda w: F.dequantize_blockwise(w.byte(), absmax=w[0]), "absmax has 64 values, wanted 1"),
    (lambda w: F.create_dynamic_map(total_bits=9), "max_exponent_bits is 7, wanted 1 to 9"),
    (lambda w: F.create_dynamic_map(signed=False, max_exponent_bits=3), "is 3, wanted 7"),
    (lambda w: F.QuantState.from_dict({}, "cpu"), "got nothing; wanted one of"),
    (lambda w: F.QuantState.from_dict({"quant_type": "nf4"}, "cpu"), "missing absmax, blocksize, dtype, quant_map"),
    (lambda w: F.QuantState.from_dict({"quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "cpu"), "not UTF-8 JSON"),
])
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(8, 64))


# ------------------------------------------------------------------ QuantState


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(16, 128), (4, 8, 64)], ids=str)
def test_state_survives_dictionaries(shape, double_quant):
    w = weight(*shape, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    for stored in (state.as_dict(), state.as_dict(packed=True)):
        with_prefix = {f"layer.weight.{key}": value for key, value in stored.items()}
        before = set(with_prefix)
        back = F.QuantState.from_dict(with_prefix, torch.device("cpu"))
        assert set(with_prefix) == before and back == state
        assert torch.equal(F.dequantize_4bit(packed, back), F.dequantize_4bit(packed, state))
    assert all(isinstance(value, torch.Tensor) for value in state.as_dict(packed=True).values())
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    assert not hasattr(state, "bitsandbytes__fp4") and not hasattr(state, "packing_format_for_cpu")
    assert state[0] is state.absmax and state[5] == "nf4" and (state[4] is None) == (not double_quant)
    assert state != F.quantize_4bit(w * 2, quant_type="nf4", compress_statistics=double_quant)[1] and state != 1


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(24, 128), (24, 96)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_4bit_is_the_cores_with_gradients(dtype, shape, double_quant):
    w, (n, k) = weight(*shape, dtype=dtype), shape
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant, quant_storage=torch.bfloat16)
    core = ops.quantize_4bit(w, double_quant=double_quant)
    x = torch.randn(2, 3, k, dtype=dtype, requires_grad=True)
    bias = torch.randn(n, dtype=dtype, requires_grad=True)
    settings = dict(absmax2=core.absmax2, absmax_offset=core.absmax_offset)
    wanted = ops.linear4bit(x, *core[:2], n, bias, **settings)
    gx, gb = torch.autograd.grad(wanted.float().sum(), (x, bias))
    for b in (packed, packed.t()):
        y = bnb.matmul_4bit(x, b, state, bias=bias)
        assert torch.equal(y, wanted) and y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), (x, bias))
        assert torch.equal(grads[0], gx) and torch.equal(grads[1], gb)
    out = torch.empty_like(wanted)
    assert bnb.matmul_4bit(x.detach(), packed, state, out=out, bias=bias.detach()) is out and torch.equal(out, wanted)
    assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), ops.linear4bit(x, *core[:2], n, **settings))
    assert bnb.matmul_4bit(x[:0], packed, state).shape == (0, 3, n)


def test_a_weight_packed_as_k_by_n():
    w, x = weight(96, 64), torch.randn(5, 96, requires_grad=True)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="quantise it as"):
        y = bnb.matmul_4bit(x, packed, state, bias=torch.ones(64))
    dense = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(y, x @ dense + 1, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(1).expand(5, 96), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_of_frozen_int8_is_the_cores(dtype, threshold):
    w, x = weight(24, 64, dtype=dtype), torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    state = bnb.MatmulLtState()
    state.has_fp16_weights, state.threshold = False, threshold
    first = bnb.matmul(x, w, state=state, bias=torch.ones(24, dtype=dtype))  # quantises w, once
    qweight, absmax = ops.quantize_8bit(w)
    assert torch.equal(state.CB, qweight) and torch.equal(state.SCB, absmax)
    assert torch.equal(first, ops.linear8bitlt(x, qweight, absmax, torch.ones(24, dtype=dtype), threshold=threshold))
    assert torch.equal(bnb.matmul(x, torch.zeros_like(w).t(), state=state, bias=torch.ones(24, dtype=dtype)), first)
    first.float().sum().backward()
    torch.testing.assert_close(x.grad, ops.linear8bitlt_backward(torch.ones_like(first), qweight, absmax))
    state.reset_grads()
    assert state.CB is None and state.SCB is None


def test_matmul_of_a_float_weight_follows_the_weight():
    """bitsandbytes multiplies by the first weight until ``weight.grad`` is None again, and evaluates with the last
    trained one."""
    w, x = weight(24, 64).requires_grad_(), torch.randn(5, 64, requires_grad=True)
    state = bnb.MatmulLtState()
    for _ in range(3):
        y = bnb.matmul(x, w, state=state)
        qweight, absmax = ops.quantize_8bit(w.detach())
        assert torch.equal(y, ops.linear8bitlt(x.detach(), qweight, absmax, threshold=0.0))
        y.square().sum().backward()  # w.grad stays
        state.is_training = not state.is_training
        with torch.no_grad():
            w -= 0.01 * w.grad
    w.grad = x.grad = None
    y = bnb.matmul(x, w, state=state)
    gy = torch.randn_like(y)
    y.backward(gy)
    assert torch.equal(w.grad, gy.t() @ x.detach())
    assert torch.equal(x.grad, ops.linear8bitlt_backward(gy, state.CB, state.SCB))


# ------------------------------------------------------------------ 8-bit codes in blocks


def test_dynamic_map():
    assert np.array_equal(F.create_dynamic_map().numpy(), reference.DYNAMIC_MAP)
    unsigned = F.create_dynamic_map(signed=False)
    assert unsigned.min() == 0 and unsigned.unique().numel() == 256
    assert F.create_dynamic_map(True, 3, 4).unique().numel() == 16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 100, 4096])
@pytest.mark.parametrize("kind", ["dynamic", "unsigned", "unsorted", "random", "short"])
def test_blockwise_codes_are_the_nearest(kind, blocksize, dtype):
    """Against a search through all codes in float64. bitsandbytes' CPU code looks them up in 65536 bins: its zero is
    2e-5 of the absmax."""
    generator = torch.Generator().manual_seed(0)
    code = {
        "dynamic": F.create_dynamic_map(),
        "unsigned": F.create_dynamic_map(signed=False),
        "unsorted": F.create_dynamic_map()[torch.randperm(256, generator=generator)],
        "random": torch.rand(256, generator=generator) * 2 - 1,
        "short": torch.tensor([-1.0, 0.0, 0.25, 1.0]),
    }[kind]
    a = torch.randn(37, 61, generator=generator).to(dtype)
    a[0], a[1, ::2] = 0, 1e-6
    codes, state = F.quantize_blockwise(a, code=code, blocksize=blocksize)
    flat = a.flatten().float()
    absmax = torch.stack([part.abs().max() for part in flat.split(blocksize)])
    assert torch.equal(state.absmax, absmax) and codes.shape == a.shape and codes.dtype == torch.uint8
    scale = absmax.clamp(min=1e-38).reciprocal().repeat_interleave(blocksize)[: flat.numel()]
    scaled = (flat * scale).double()
    distance = (scaled[:, None] - code.double()).abs()
    assert torch.equal((scaled - code[codes.flatten().long()].double()).abs(), distance.min(1).values)
    decoded = F.dequantize_blockwise(codes, state)
    wanted = (code[codes.flatten().long()] * absmax.repeat_interleave(blocksize)[: flat.numel()]).to(dtype).view(a.shape)
    assert torch.equal(decoded, wanted) and decoded.dtype == dtype


def test_blockwise_ties_take_the_lower_value():
    code = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    a = torch.tensor([1.0, 0.75, 0.25, -0.25, -0.75, 0.25 + 2**-25, 0.25 - 2**-26, 0.0])
    codes, _ = F.quantize_blockwise(a, code=code)
    assert code[codes.long()].tolist() == [1.0, 0.5, 0.0, -0.5, -1.0, 0.5, 0.0, 0.0]
    swapped, _ = F.quantize_blockwise(a, code=code.flip(0))
    assert torch.equal(code.flip(0)[swapped.long()], code[codes.long()])


def test_blockwise_thresholds_are_exact_where_the_middle_is_no_float32():
    """Two codes an odd number of ulps apart: the float next to their middle on either side goes to its own side."""
    low, high = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    for value, wanted in [(low, 0), (high, 1)]:
        codes, _ = F.quantize_blockwise(torch.tensor([1.0, value]), code=torch.tensor([low, high, 1.0]))
        assert codes.tolist() == [2, wanted]


def test_blockwise_memory_is_linear():
    """A table of the distances to all codes would take 2 GB here."""
    import resource

    a = torch.randn(2_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.dequantize_blockwise(*F.quantize_blockwise(a))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_blockwise(blocksize):
    a = torch.randn(64, 1000)
    codes, state = F.quantize_blockwise(a, blocksize=blocksize, nested=True)
    plain_codes, plain = F.quantize_blockwise(a, blocksize=blocksize)
    assert torch.equal(codes, plain_codes) and state.nested and state.state2.blocksize == blocksize
    decoded = F.dequantize_blockwise(codes, state)
    assert (decoded - F.dequantize_blockwise(codes, plain)).abs().max() < 0.02 * plain.absmax.max()
    back = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert torch.equal(F.dequantize_blockwise(codes, back), decoded)
    out = torch.empty_like(a)
    assert F.dequantize_blockwise(codes, state, out=out) is out and torch.equal(out, decoded)
    assert torch.equal(F.dequantize_blockwise(codes, absmax=plain.absmax, blocksize=blocksize), F.dequantize_blockwise(codes, plain))


# ------------------------------------------------------------------ int8


@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 32)], ids=str)
def test_int8_rows(shape):
    a = torch.randn(*shape).half()
    q, absmax, columns = F.int8_vectorwise_quant(a)
    core = ops.quantize_8bit(a.view(-1, 32))
    assert torch.equal(q, core[0].view(shape)) and torch.equal(absmax, core[1]) and columns is None
    dense = F.int8_vectorwise_dequant(q, absmax)
    assert dense.shape == shape and torch.equal(dense.view(-1, 32), ops.dequantize_8bit(*core))


def test_int8_outliers_leave_their_columns():
    """bitsandbytes zeroes the caller's outliers for the time of the call; here nothing is written to."""
    a = torch.randn(6, 32).clamp(-2, 2)
    a[1, 3], a[4, 7] = 8, -6
    before = a.clone()
    q, absmax, columns = F.int8_vectorwise_quant(a, threshold=6.0)
    assert torch.equal(a, before) and columns.tolist() == [3, 7] and columns.dtype == torch.int64
    assert (q[:, [3, 7]] == 0).all() and absmax.max() <= 2
    kept = a.clone()
    kept[1, 3] = kept[4, 7] = 0
    wanted = ops.quantize_8bit(kept)
    wanted[0][:, [3, 7]] = 0
    assert torch.equal(q, wanted[0]) and torch.equal(absmax, wanted[1])
    row, _, columns = F.int8_vectorwise_quant(a[1:2], threshold=6.0)
    assert columns.tolist() == [3] and row[0, 3] == 0 and row[0, 7] != 0
    assert F.int8_vectorwise_quant(before.clamp(-1, 1), threshold=6.0)[2].numel() == 0


def test_int8_double_quant_is_both_ways():
    a = torch.randn(6, 32)
    a[2, 5] = 9
    by_row, by_column, row_absmax, column_absmax, columns = F.int8_double_quant(a, threshold=6.0)
    assert columns.tolist() == [5]
    kept = a.clone()
    kept[2, 5] = 0
    wanted = ops.quantize_8bit(kept.t())
    assert torch.equal(by_column, wanted[0].t()) and torch.equal(column_absmax, wanted[1])
    assert torch.equal(by_row, F.int8_vectorwise_quant(a, 6.0)[0]) and row_absmax.shape == (6,)


def test_int8_product_is_exact_beyond_float32():
    """bitsandbytes without AVX-512 sums in float32, which is exact up to 1024 columns only."""
    a, b = torch.full((2, 5000), -128, dtype=torch.int8), torch.full((3, 5000), -128, dtype=torch.int8)
    b[1, 0] = 127
    wanted = a.long() @ b.long().t()
    product = F.int8_linear_matmul(a, b)
    assert product.dtype == torch.int32 and torch.equal(product.long(), wanted)
    out = torch.empty(2, 3, dtype=torch.int32)
    assert F.int8_linear_matmul(a, b, out=out) is out and torch.equal(out, product)


def test_int8_sums_are_scaled_by_127_squared():
    """bitsandbytes' CPU constant is 6.200124e-05, 2e-6 too large; 1 / 127^2 is 6.200012e-05."""
    a, b = torch.randn(4, 256), torch.randn(8, 256)
    (qa, sa, _), (qb, sb, _) = F.int8_vectorwise_quant(a), F.int8_vectorwise_quant(b)
    sums = F.int8_linear_matmul(qa, qb)
    exact = sums.double() * sa.double()[:, None] * sb.double() / 127**2 + 1
    bias = torch.ones(8)
    result = F.int8_mm_dequant(sums, sa, sb, bias=bias)
    assert result.dtype == torch.float16 and torch.allclose(result.double(), exact, rtol=1e-3)
    single = torch.ops.bnbq_bitsandbytes.int8_scaled_mm(qa, qb, sa, sb, bias, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_pieces_of_int8_make_the_layers_product(threshold):
    a, w, bias = torch.randn(6, 64), weight(16, 64), torch.randn(16)
    (qa, sa, columns), (qw, sw, _) = F.int8_vectorwise_quant(a, threshold), F.int8_vectorwise_quant(w)
    out, outliers = torch.ops.bnbq_bitsandbytes.int8_mixed_scaled_mm(a, qa, qw, sa, sw, columns, bias)
    wanted = ops.linear8bitlt(a, qw, sw, bias, threshold=threshold)
    # The layer's scales of x are finer: they leave out all of an outlier's column, not only the outlier.
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=0.05 if threshold else 1e-5)
    exact = a.double() @ F.int8_vectorwise_dequant(qw, sw).double().t() + bias
    assert (out - exact).norm() < 0.01 * exact.norm()
    assert torch.equal(outliers, a[:, columns] if threshold else a.new_empty(0))


# ------------------------------------------------------------------ torch.ops


def operators():
    a, x = torch.randn(16, 128), torch.randn(2, 3, 128)
    packed, state = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    plain = F.quantize_4bit(a, quant_type="nf4")[1].absmax
    q, absmax, _ = F.int8_vectorwise_quant(a)
    code = F.create_dynamic_map()
    codes, blockwise = F.quantize_blockwise(a, blocksize=100)
    nested = (None, state.absmax, state.state2.code, state.offset)
    sums = F.int8_linear_matmul(q, q)
    return {
        "quantize_4bit": (a, 64, "nf4", torch.uint8),
        "dequantize_4bit": (packed, plain, 64, "nf4", [16, 128], torch.bfloat16),
        "dequantize_4bit.out": (packed, plain, 64, "nf4", [16, 128], torch.float32, torch.empty(16, 128)),
        "gemm_4bit": (x, packed, [16, 128], state.state2.absmax, 64, "nf4", *nested),
        "gemv_4bit": (x, packed, [16, 128], plain, state.code, 64),
        "gemv_4bit.out": (x, packed, [16, 128], plain, state.code, 64, torch.empty(2, 3, 16)),
        "quantize_blockwise": (a, code, 100),
        "dequantize_blockwise": (codes, blockwise.absmax, code, 100, torch.float16),
        "dequantize_blockwise.out": (codes, blockwise.absmax, code, 100, torch.float32, torch.empty(16, 128)),
        "int8_linear_matmul": (q, q),
        "int8_linear_matmul.out": (q, q, torch.empty(16, 16, dtype=torch.int32)),
        "int8_scaled_mm": (q, q, absmax, absmax),
        "int8_mixed_scaled_mm": (a, q, q, absmax, absmax, torch.tensor([3, 5])),
        "int8_vectorwise_quant": (a,),
        "int8_vectorwise_dequant": (q, absmax),
        "int8_mm_dequant": (sums, absmax, absmax),
        "int8_double_quant": (a, 3.0),
    }


@pytest.mark.parametrize("name", operators())
def test_operators_can_be_traced(name):
    op, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bnbq_bitsandbytes, op), overload or "default")
    # test_aot_dispatch_dynamic compiles three times: the shapes are what the fake tensors check.
    torch.library.opcheck(op, operators()[name], test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_gemm_4bit_has_gradients():
    """bitsandbytes' operator has none: torch warns, and the gradient is lost."""
    arguments = list(operators()["gemm_4bit"])
    arguments[0].requires_grad_()
    torch.ops.bnbq_bitsandbytes.gemm_4bit(*arguments).sum().backward()
    assert arguments[0].grad.abs().sum() > 0


def test_operators_refuse_what_does_not_fit():
    bnb_ops = torch.ops.bnbq_bitsandbytes
    x, packed, shape, absmax, code, blocksize = operators()["gemv_4bit"]
    with pytest.raises(ValueError, match="wanted the nf4 or the fp4 codebook"):
        bnb_ops.gemv_4bit(x, packed, shape, absmax, code + 1, blocksize)
    with pytest.raises(ValueError, match=r"out is float32 \[3\] on cpu, wanted float32 \[2, 3, 16\]"):
        bnb_ops.gemv_4bit.out(x, packed, shape, absmax, code, blocksize, torch.empty(3))
    with pytest.raises(ValueError, match="without absmax_code"):
        bnb_ops.gemm_4bit(x, packed, shape, absmax, 64, "nf4", absmax_8bit=absmax.byte())


def test_names_that_are_not_here_say_why():
    for module, name in itertools.chain(
        ((bnb, "optim"), (bnb, "research"), (bnb.nn, "StableEmbedding"), (bnb.nn, "OutlierAwareLinear")),
        ((F, name) for name in ("optimizer_update_32bit", "igemm", "create_fp8_map", "get_paged")),
    ):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}': .{{20}}"):
            getattr(module, name)
        assert not hasattr(module, name)
    with pytest.raises(ImportError, match="has no optim: 8-bit and paged optimizers are outside bnbq"):
        from bnbq.bitsandbytes.optim import AdamW8bit  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'$"):
        bnb.nonsense  # noqa: B018
