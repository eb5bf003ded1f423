"""The operations on a GPU, against float64, and against the CPU where bytes are defined.

Skipped where torch sees no GPU or the extension was built without CUDA. BNBQ_TEST_DEVICE=cpu runs what is not about
CUDA on the CPU instead: a check of these tests, not of the kernels.
"""

import os

import numpy as np
import pytest

import cases
from bnbq import _bnbq, ops
from bnbq import reference as ref

torch = pytest.importorskip("torch")

DEVICE = os.environ.get("BNBQ_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
WHY_NOT = None
if ON_CUDA and not torch.cuda.is_available():
    WHY_NOT = "torch sees no GPU"
elif ON_CUDA and not _bnbq.build_info()["cuda"]:
    WHY_NOT = "this build has no CUDA"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="about CUDA")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# m on both sides of every change of kernel, shapes with every tail, and one that fills a GPU.
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 129, 300, 1030)
PRODUCTS = [(m, n, k) for n, k in ((16, 64), (17, 96), (130, 320)) for m in ROWS]
PRODUCTS += [(m, 4096, 4096) for m in (1, 16, 64, 300)]
FLAT = ((3, 5), (33, 127), (40, 100))


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE, dtype)


def dense4(packed, shape, quant_type, blocksize):
    """The weight in float64."""
    qweight, absmax, *second = [None if t is None else t.cpu().numpy() for t in packed]
    if second[0] is not None:
        absmax = ref.dequantize_absmax(absmax, *second)
    return ref.dequantize_4bit(qweight, absmax, shape, quant_type, blocksize).astype(np.float64)


def close(y, x, w, bias=None, weight_error=0.0):
    """y against x . w^T in float64, within what rounding the output, the sums and perhaps the weight may do."""
    x = x.double().cpu().numpy()
    want, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        want = want + bias.double().cpu().numpy()
    k, eps = x.shape[-1], EPSILON[y.dtype]
    bound = size * (weight_error + 2.0**-23 * np.sqrt(k) * 8) + np.abs(want) * eps + 1e-30
    error = np.abs(y.double().cpu().numpy() - want)
    assert (error <= bound).all(), f"error {error.max():.3g} where {bound[np.unravel_index(error.argmax(), error.shape)]:.3g} is allowed"


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("quant_type", cases.FORMATS)
@pytest.mark.parametrize("shape", [(130, 4096), *FLAT], ids=str)
def test_bytes_of_4_bits_are_those_of_the_cpu(shape, quant_type, blocksize, dtype):
    w = tensor(cases.weight(*shape), dtype)
    here, there = (ops.quantize_4bit(t, quant_type, blocksize, double_quant=True) for t in (w, w.cpu()))
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    settings = {"absmax2": here.absmax2, "absmax_offset": here.absmax_offset, "quant_type": quant_type, "blocksize": blocksize}
    out = ops.dequantize_4bit(here.qweight, here.absmax, shape, dtype=dtype, **settings)
    settings = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    assert torch.equal(out.cpu(), ops.dequantize_4bit(there.qweight, there.absmax, shape, dtype=dtype, **settings))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", (0, 32, 64, 256))
@pytest.mark.parametrize("shape", [(1, 1), (33, 127), (130, 4096), (5, 20000)], ids=str)
def test_bytes_of_8_bits_are_those_of_the_cpu(shape, blocksize, dtype):
    w = tensor(cases.weight(*shape), dtype)
    here, there = (ops.quantize_8bit(t, blocksize) for t in (w, w.cpu()))
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    out = ops.dequantize_8bit(*here, blocksize=blocksize, dtype=dtype)
    assert torch.equal(out.cpu(), ops.dequantize_8bit(*there, blocksize=blocksize, dtype=dtype))


def test_many_scales_are_packed_as_on_the_cpu():
    absmax = tensor(np.abs(cases.formula(300_001)))
    for ours, theirs in zip(ops.quantize_absmax(absmax), ops.quantize_absmax(absmax.cpu()), strict=True):
        assert torch.equal(ours.cpu(), theirs)


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_linear4bit(m, n, k, dtype):
    blocksize, double = (32, True) if k % 64 else (64, m % 2 == 0)
    packed = ops.quantize_4bit(tensor(cases.weight(n, k)), "nf4", blocksize, double)
    x, bias = tensor(cases.activations(m, k), dtype), tensor(cases.formula(n), dtype)
    y = ops.linear4bit(x, packed.qweight, packed.absmax, n, bias, absmax2=packed.absmax2,
                       absmax_offset=packed.absmax_offset, blocksize=blocksize)
    assert (y.dtype, y.shape, y.device) == (dtype, (m, n), x.device)
    close(y, x, dense4(packed, (n, k), "nf4", blocksize), bias, 0 if dtype == torch.float32 else EPSILON[dtype])


@pytest.mark.parametrize("quant_type", cases.FORMATS)
@pytest.mark.parametrize("blocksize", cases.BLOCKSIZES)
@pytest.mark.parametrize("m", (1, 16, 100))
def test_formats_and_blocks(m, blocksize, quant_type):
    n, k = 48, 4096
    packed = ops.quantize_4bit(tensor(cases.weight(n, k)), quant_type, blocksize)
    x = tensor(cases.activations(m, k), torch.bfloat16)
    y = ops.linear4bit(x, *packed[:2], n, quant_type=quant_type, blocksize=blocksize)
    close(y, x, dense4(packed, (n, k), quant_type, blocksize), None, EPSILON[torch.bfloat16])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", FLAT, ids=str)
def test_blocks_that_cross_rows(shape, dtype):
    n, k = shape
    packed = ops.quantize_4bit(tensor(cases.weight(n, k)))
    for m in (1, 9, 70):
        x = tensor(cases.activations(m, k), dtype)
        close(ops.linear4bit(x, *packed[:2], n), x, dense4(packed, shape, "nf4", 64), None, EPSILON[dtype])


@pytest.mark.parametrize("m", (1, 40))
def test_the_compute_dtype_and_strides(m):
    n, k = 130, 320
    packed = ops.quantize_4bit(tensor(cases.weight(n, k)))
    wide = tensor(cases.activations(m, 2 * k))
    for x in (wide[:, ::2], wide[:, 3 : k + 3], wide.T[:k].T):
        for compute in FLOATS:
            y = ops.linear4bit(x, *packed[:2], n, compute_dtype=compute)
            close(y, x.to(compute), dense4(packed, (n, k), "nf4", 64), None, 0 if compute == torch.float32 else EPSILON[compute])


def linear8(x, q, absmax, threshold, blocksize):
    """reference.linear_8bit, and absolute sums that bound the rounding: of all, and of the outliers."""
    x, q, absmax = x.float().cpu().numpy(), q.cpu().numpy(), absmax.cpu().numpy()
    want = ref.linear_8bit(x, q, absmax, None, threshold, blocksize).astype(np.float64)
    size, w = np.abs(x).astype(np.float64), np.abs(ref.dequantize_8bit(q, absmax, blocksize)).astype(np.float64)
    return want, size @ w.T, np.where(ref.outliers_per_column(x, threshold), size, 0) @ w.T


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*PRODUCTS, (5, 17, 97), (70, 17, 97)])
def test_linear8bitlt(m, n, k, dtype):
    for blocksize, threshold, outliers in ((0, 6.0, 0), (0, 6.0, 3), (64, 6.0, 3), (0, 0.0, 3)):
        q, absmax = ops.quantize_8bit(tensor(cases.weight(n, k)), blocksize)
        x, bias = tensor(cases.activations(m, k, outliers=outliers), dtype), tensor(cases.formula(n))
        y = ops.linear8bitlt(x, q, absmax, bias, threshold=threshold, blocksize=blocksize)
        want, size, size_of_outliers = linear8(x, q, absmax, threshold, blocksize)
        want = want + bias.double().cpu().numpy()
        bound = size * 2.0**-23 * np.sqrt(k) * 8 + (size_of_outliers + np.abs(want)) * EPSILON[dtype] + 1e-30
        assert (np.abs(y.double().cpu().numpy() - want) <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", (1, 64))
def test_gradients(m, dtype):
    n, k = 130, 320
    packed, (q, absmax) = ops.quantize_4bit(tensor(cases.weight(n, k))), ops.quantize_8bit(tensor(cases.weight(n, k)))
    gy = tensor(cases.activations(m, n), dtype)
    for gx, w in ((ops.linear4bit_backward(gy, *packed[:2], k), dense4(packed, (n, k), "nf4", 64)),
                  (ops.linear8bitlt_backward(gy, q, absmax), ref.dequantize_8bit(q.cpu().numpy(), absmax.cpu().numpy()))):
        close(gx, gy, w.T.astype(np.float64), None, EPSILON[dtype])
    x = tensor(cases.activations(m, k), dtype).requires_grad_()
    ops.linear4bit(x, *packed[:2], n).backward(gy)
    assert torch.equal(x.grad, ops.linear4bit_backward(gy, *packed[:2], k))


def test_a_row_does_not_depend_on_its_batch():
    n, k = 130, 1024
    packed, (q, absmax) = ops.quantize_4bit(tensor(cases.weight(n, k))), ops.quantize_8bit(tensor(cases.weight(n, k)))
    x = tensor(cases.activations(257, k, outliers=2), torch.bfloat16)
    ops.set_batch_invariant(True)
    try:
        whole4, whole8 = ops.linear4bit(x, *packed[:2], n), ops.linear8bitlt(x, q, absmax)
        for m in (1, 2, 8, 9, 31, 33, 64, 65, 130):
            assert torch.equal(ops.linear4bit(x[:m], *packed[:2], n), whole4[:m])
            assert torch.equal(ops.linear8bitlt(x[:m], q, absmax), whole8[:m])
    finally:
        ops.set_batch_invariant(False)


def test_what_is_not_finite_stays_in_its_row():
    n, k = 130, 320
    packed, (q, absmax) = ops.quantize_4bit(tensor(cases.weight(n, k))), ops.quantize_8bit(tensor(cases.weight(n, k)))
    x = cases.activations(40, k)
    x[7, 3], x[20, 100] = np.nan, np.inf
    for y in (ops.linear4bit(tensor(x, torch.bfloat16), *packed[:2], n), ops.linear8bitlt(tensor(x), q, absmax)):
        broken = ~y.float().isfinite().any(1)
        assert broken.nonzero().flatten().tolist() == [7, 20]


# ------------------------------------------------------------------ CUDA


@only_cuda
def test_work_goes_to_the_current_stream():
    """The stream is kept busy first: a call that did not wait for it would multiply zeros."""
    n, k, m = 1024, 1024, 8
    packed = ops.quantize_4bit(tensor(cases.weight(n, k)))
    x = tensor(cases.activations(m, k), torch.bfloat16)
    want = ops.linear4bit(x, *packed[:2], n)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = ops.linear4bit(late, *packed[:2], n)
    stream.synchronize()
    assert torch.equal(y, want)


@only_cuda
@pytest.mark.parametrize("m", (1, 16, 100))
def test_calls_are_captured_in_a_graph(m):
    n, k = 512, 1024
    w = tensor(cases.weight(n, k), torch.bfloat16)
    packed, (q, absmax) = ops.quantize_4bit(w, double_quant=True), ops.quantize_8bit(w)
    x = tensor(cases.activations(m, k, outliers=2), torch.bfloat16)

    def work():
        again = ops.quantize_4bit(w, double_quant=True)
        return (*again, ops.linear4bit(x, packed.qweight, packed.absmax, n, absmax2=packed.absmax2,
                                       absmax_offset=packed.absmax_offset), ops.linear8bitlt(x, q, absmax))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in (2, 3):
        x.copy_(tensor(cases.activations(m, k, seed, outliers=2), torch.bfloat16))
        graph.replay()
        for ours, eager in zip(captured, work(), strict=True):
            assert torch.equal(ours, eager)


@only_cuda
def test_nothing_waits_for_the_gpu():
    n, k = 512, 1024
    packed, (q, absmax) = ops.quantize_4bit(tensor(cases.weight(n, k))), ops.quantize_8bit(tensor(cases.weight(n, k)))
    x = tensor(cases.activations(4, k, outliers=2), torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.linear4bit(x, *packed[:2], n)
        ops.linear8bitlt(x, q, absmax)
        ops.dequantize_4bit(*packed[:2], (n, k))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_cuda
def test_devices_may_not_be_mixed():
    packed = ops.quantize_4bit(tensor(cases.weight(16, 64)))
    with pytest.raises(RuntimeError, match="wanted all on one device"):
        ops.linear4bit(torch.zeros(2, 64), *packed[:2], 16)


@only_cuda
def test_a_layer_moves_there_and_back():
    import bnbq

    layer = bnbq.nn.Linear4bit(320, 130)
    layer.weight = torch.from_numpy(cases.weight(130, 320))
    x = torch.from_numpy(cases.activations(5, 320))
    with torch.no_grad():
        before = layer(x)
        there = layer.to(DEVICE)(x.to(DEVICE)).cpu()
        after = layer.to("cpu")(x)
    assert torch.equal(before, after)
    assert torch.allclose(before, there, rtol=1e-4, atol=1e-5)


# The largest error of the logits over their norm, of a model on the CPU and with one layer, or all, on the device.
# What rounds the inputs of a layer (to int8, to bf16) turns one last bit into a step of theirs.
BETWEEN_DEVICES = {torch.float32: {4: 1e-5, 8: 1e-2}, torch.bfloat16: {4: 2e-2, 8: 2e-2}}


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", BETWEEN_DEVICES, ids=str)
def test_a_split_model_gives_the_logits_of_the_cpu(tmp_path, dtype, bits):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("accelerate")
    import bnbq
    import small_models

    source = small_models.llama(tmp_path / "llama", dtype=dtype, tokenizer=False, initializer_range=0.2)
    ids = torch.arange(2 * 30).reshape(2, 30)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")

    def logits(there):
        device_map = {part: DEVICE if part in there else "cpu" for part in parts}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=bnbq.BnbqConfig(bits=bits), dtype=dtype, device_map=device_map
        )
        with torch.no_grad():
            return model(ids.to(model.device)).logits.double().cpu()

    want = logits(())
    for there in (parts[:2], parts[2:3], parts):
        error = (logits(there) - want).norm() / want.norm()
        assert error < BETWEEN_DEVICES[dtype][bits], there
