"""Quantised embeddings: rows are those of the dequantised table, and what is tied to a table shares its bytes."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

import bnbq  # noqa: E402
from bnbq import nn, ops  # noqa: E402
from bnbq.config import BnbqConfig  # noqa: E402
from bnbq.selection import select  # noqa: E402

N = 700  # with 8 blocks a row: scales of rows cross the blocks of 256 of double quantisation


def table(k, n=N, padding_idx=None, dtype=torch.float32, kind=torch.nn.Embedding, **settings):
    torch.manual_seed(k)
    return kind(n, k, padding_idx, **settings).to(dtype)


def build(module, bits, **settings):
    return (nn.Embedding4bit if bits == 4 else nn.Embedding8bit).from_embedding(module, **settings)


FORMATS = [
    *(
        (4, dict(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant))
        for quant_type, blocksize, double_quant in [
            ("nf4", 64, False),
            ("nf4", 32, True),
            ("fp4", 128, True),
            ("int4", 64, False),
        ]
    ),
    (8, {}),
    (8, dict(blocksize=64)),
]
NAMES = ["-".join(map(str, (bits, *settings.values()))) for bits, settings in FORMATS]
KINDS = pytest.mark.parametrize("bits, settings", FORMATS, ids=NAMES)


# ------------------------------------------------------------------ lookup


@KINDS
@pytest.mark.parametrize("k", [256, 128, 100, 72, 33, 1])
def test_rows_are_those_of_the_dequantised_table(bits, settings, k):
    """Also where blocks cross rows, and bit for bit."""
    module = build(table(k), bits, **settings)
    dense = module.dequantize()
    for ids in (
        torch.randint(0, N, (3, 11)),
        torch.tensor([0, N - 1, 0], dtype=torch.int32),
        torch.tensor(N - 1),
        torch.empty(2, 0, dtype=torch.long),
        torch.arange(N).view(10, 70).t(),
    ):
        rows = module(ids)
        assert rows.shape == (*ids.shape, k) and not rows.requires_grad
        assert torch.equal(rows, dense[ids.long()])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_have_the_dtype_of_the_table(bits, settings, dtype):
    module = build(table(64, dtype=dtype), bits, **settings)
    assert module(torch.tensor([3])).dtype == module.weight.dtype == module.like.dtype == dtype
    module.float()
    assert module(torch.tensor([3])).dtype == module.like.dtype == torch.float32
    assert all(module._parameters[name].dtype == dtype for name, (_, dtype) in module.packed_spec().items())


@KINDS
@pytest.mark.parametrize("k", [128, 72])
def test_only_the_rows_asked_for_are_decoded(bits, settings, k, monkeypatch):
    module = build(table(k), bits, **settings)
    decoded = []
    for name in ("dequantize_4bit", "dequantize_8bit", "dequantize_absmax"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, f=original, **kw: decoded.append(result := f(*a, **kw)) or result
        )
    module(torch.tensor([5, 600]))
    blocks = k // (module.blocksize or k) + 2
    assert sum(x.numel() for x in decoded) <= 2 * (blocks * (module.blocksize or k) + 2 * 256)
    assert len(decoded) <= 2


@KINDS
def test_ids_out_of_range_are_an_index_error(bits, settings):
    for k in (64, 72):
        module = build(table(k), bits, **settings)
        for bad in (N, -1, 2**40, -(2**63)):
            with pytest.raises(IndexError, match=rf"Embedding{bits}bit\({N}, {k}.*id {bad} is out of range, expected 0 to {N - 1}"):
                module(torch.tensor([[1, bad]]))
        with pytest.raises(TypeError, match="ids are torch.float32, expected torch.int64 or torch.int32"):
            module(torch.ones(2))


@KINDS
def test_padding_row_is_zero(bits, settings):
    module = build(table(128, padding_idx=3), bits, **settings)
    assert module.padding_idx == 3 and "padding_idx=3" in repr(module)
    assert not module(torch.tensor(3)).any() and module(torch.tensor(2)).any()


def test_compiles_whole():
    for k in (64, 72):
        module = build(table(k), 4, double_quant=True)
        compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
        for ids in (torch.arange(7), torch.arange(30).view(5, 6)):
            assert torch.equal(compiled(ids), module(ids))


# ------------------------------------------------------------------ the module


@KINDS
def test_bytes_are_those_of_a_linear_layer(bits, settings):
    for k in (128, 72):
        source = table(k)
        module = build(source, bits, **settings)
        linear = torch.nn.Linear(k, N, bias=False)
        linear.weight = source.weight
        layer = (nn.Linear4bit if bits == 4 else nn.Linear8bitLt).from_linear(linear, **settings)
        for name in layer.packed_spec():
            assert torch.equal(getattr(module, name), getattr(layer, name))
        assert module.packed_spec() == layer.packed_spec() and module.format() == layer.format()


@KINDS
def test_copies_compute_the_same(bits, settings):
    module = build(table(72, padding_idx=1), bits, **settings)
    ids = torch.arange(20)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    empty = type(module)(N, 72, 1, device="meta", **settings)
    empty.load_state_dict(torch.load(file), assign=True)
    for other in (*copies, empty):
        assert torch.equal(other(ids), module(ids)) and other.padding_idx == 1
        assert {k: v.dtype for k, v in other.state_dict().items()} == {k: v.dtype for k, v in module.state_dict().items()}


@KINDS
def test_loads_a_float_state_dict(bits, settings):
    source = table(72)
    module = type(build(source, bits, **settings))(N, 72, **settings)
    assert not module.load_state_dict(source.state_dict()).missing_keys
    assert torch.equal(module.qweight, build(source, bits, **settings).qweight)
    with pytest.raises(RuntimeError, match=r"wanted a float weight of shape \[700, 72\]"):
        module.load_state_dict({"weight": torch.ones(3, 72)})


@KINDS
def test_the_weight_can_be_read_and_written(bits, settings):
    module, new = build(table(64), bits, **settings), table(64, n=N + 1).weight.detach()[1:]
    assert module.weight.shape == (N, 64) and torch.equal(module.weight + 0, module.dequantize())
    module.weight.data.copy_(new)
    wanted = torch.nn.Embedding(N, 64, _weight=new)
    assert torch.equal(module.qweight, build(wanted, bits, **settings).qweight)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        module.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="has 701 rows, expected 700; resize the embeddings of the float model"):
        module.weight = torch.ones(N + 1, 64)


def test_new_and_empty_modules():
    torch.manual_seed(0)
    module = nn.Embedding4bit(50, 64, padding_idx=-1, weight_dtype=torch.bfloat16)
    torch.manual_seed(0)
    plain = torch.nn.Embedding(50, 64, padding_idx=-1, dtype=torch.bfloat16)
    assert torch.equal(module.qweight, build(plain, 4).qweight) and module.padding_idx == plain.padding_idx == 49
    before = module.qweight.clone()
    module.reset_parameters()
    assert not torch.equal(module.qweight, before) and not module(torch.tensor(49)).any()
    empty = nn.Embedding8bit(50, 64, device="meta")
    assert all(p.is_meta for p in empty.parameters()) and empty(torch.ones(2, dtype=torch.long, device="meta")).is_meta


@pytest.mark.parametrize(
    "make, kind, text",
    [
        (lambda: nn.Embedding4bit(-1, 64), ValueError, "num_embeddings is -1, expected at least 0"),
        (lambda: nn.Embedding4bit(8, 6.0), TypeError, "embedding_dim is 6.0, expected an int"),
        (lambda: nn.Embedding4bit(8, 64, 8), ValueError, "padding_idx is 8, expected an id of one of 8 embeddings"),
        (lambda: nn.Embedding4bit(8, 64, blocksize=7), ValueError, "blocksize: got 7"),
        (lambda: nn.Embedding4bit(8, 64, weight_dtype=torch.int8), TypeError, "weight_dtype is torch.int8"),
        (lambda: build(torch.nn.Linear(4, 4), 4), TypeError, "got Linear, expected nn.Embedding"),
        (lambda: build(build(table(64), 8), 8), TypeError, "got Embedding8bit, expected nn.Embedding"),
        (lambda: build(table(64, max_norm=1.0), 8), ValueError, "max_norm is 1.0, expected None"),
    ],
)
def test_bad_settings(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_a_table_that_is_not_finite_names_the_index():
    source = table(64)
    source.weight.data[3, 17] = float("nan")
    with pytest.raises(ValueError, match=r"nan at index \(3, 17\)"):
        build(source, 4)


class Scaled(torch.nn.Embedding):
    """What transformers' scaled embeddings are, with a buffer and a trainable Parameter."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = torch.nn.Buffer(torch.tensor(3.0))
        self.shift = torch.nn.Parameter(torch.ones(sizes[1]))

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype) + self.shift


@KINDS
def test_a_subclass_keeps_its_forward(bits, settings):
    source = table(64, kind=Scaled, dtype=torch.bfloat16)
    calls = []
    source.register_forward_hook(lambda *arguments: calls.append(1))
    module = build(source, bits, **settings)
    plain, ids = build(torch.nn.Embedding(N, 64, _weight=source.weight.detach()), bits, **settings), torch.arange(9)
    assert isinstance(module, Scaled) and isinstance(module, nn.QuantizedEmbedding) and module.shift is source.shift
    assert torch.equal(module(ids), plain(ids) * 3 + 1) and calls == [1]
    module(ids).sum().backward()
    assert source.shift.grad.eq(9).all()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(build(table(64, kind=Scaled), bits, **settings)))]
    assert all(type(other) is type(module) for other in copies) and torch.equal(copies[0](ids), module(ids))
    state = module.state_dict()
    state["scale"] = torch.tensor(2.0)
    module.load_state_dict(state)
    assert torch.equal(module(ids), plain(ids) * 2 + 1)
    back = module.to_embedding()
    assert type(back) is Scaled and torch.equal(back(ids), module(ids)) and set(back.state_dict()) == {"weight", "scale", "shift"}


# ------------------------------------------------------------------ quantize_model


class Tied(torch.nn.Module):
    def __init__(self, k=64):
        super().__init__()
        self.embed, self.positions = torch.nn.Embedding(N, k, padding_idx=0), torch.nn.Embedding(32, k)
        self.up, self.last = torch.nn.Linear(k, k), torch.nn.Linear(k, k)
        self.head = torch.nn.Linear(k, N)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[-1]))
        return self.head(self.last(self.up(x).relu()))


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied()


IDS = torch.arange(1, 11)[None]
CONFIGS = [dict(), dict(double_quant=True), dict(blocksize=128), dict(bits=8)]


def storages(model):
    """Bytes of all the memory that the tensors of a model lie in."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def config(**settings):
    return BnbqConfig(quantize_embeddings=True, **settings)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_a_tied_head_shares_the_bytes(tied, settings):
    float_bytes, bias, expected = storages(tied), tied.head.bias, tied(IDS)
    result = bnbq.quantize_model(tied, config(**settings))
    assert tied.head.qweight is tied.embed.qweight and tied.head.absmax is tied.embed.absmax and tied.head.bias is bias
    assert storages(tied) == bnbq.get_memory_footprint(tied) == result.bytes
    table_bytes = sum(p.nbytes for name, p in tied.embed.named_parameters() if name != "like")
    assert table_bytes < (0.15 if settings.get("bits") != 8 else 0.27) * 4 * N * 64
    assert float_bytes - storages(tied) > 4 * N * 64 - table_bytes
    assert bnbq.count_parameters(tied) == sum(p.numel() for p in Tied().parameters())
    assert (tied(IDS) - expected).norm() < 0.2 * expected.norm()
    # The head computes with the kernels of a layer of its own, on the same tensors.
    x = torch.randn(3, 64)
    linear = torch.nn.Linear(64, N)
    linear.weight, linear.bias = torch.nn.Parameter(tied.embed.dequantize()), bias
    kind = nn.Linear8bitLt if settings.get("bits") == 8 else nn.Linear4bit
    assert type(tied.head) is kind and (tied.head(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    assert "3 of 3 linear layers and 2 embeddings" in result.summary()


@pytest.mark.parametrize("change", ["to", "half", "deepcopy", "pickle", "state", "write"])
def test_the_tie_lasts(tied, change):
    bnbq.quantize_model(tied, config())
    before = tied.embed.qweight.clone()
    if change == "to":
        tied.to("cpu", torch.bfloat16)
    elif change == "half":
        tied.half()
    elif change == "deepcopy":
        tied = copy.deepcopy(tied)
    elif change == "pickle":
        tied = pickle.loads(pickle.dumps(tied))
    elif change == "state":
        tied.load_state_dict(tied.state_dict())
    else:
        tied.head.weight.data[5] = 2 * tied.embed(torch.tensor(5))
        assert torch.equal(tied.embed(torch.tensor(5)), tied.head.dequantize()[5])
        before[5] = tied.embed.qweight[5]
    assert tied.head.qweight is tied.embed.qweight and torch.equal(tied.head.qweight, before)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_save_and_load_keep_the_tie(tied, settings, tmp_path):
    bnbq.quantize_model(tied, config(**settings))
    bnbq.save(tied, tmp_path / "saved")
    for target in (Tied().to("meta"), Tied(), bnbq.quantize_model(other := Tied(), config(**settings)) and other):
        again = bnbq.load(target, tmp_path / "saved")
        assert again.head.qweight is again.embed.qweight and torch.equal(again(IDS), tied(IDS))
        assert again.embed.padding_idx == 0 and storages(again) == storages(tied)


def test_load_keeps_the_forward_of_a_subclass(tmp_path):
    model = torch.nn.Sequential(table(64, kind=Scaled))
    bnbq.quantize_model(model, config(bits=8))
    bnbq.save(model, tmp_path)
    for target in (torch.nn.Sequential(Scaled(N, 64)), copy.deepcopy(model)):
        again = bnbq.load(target, tmp_path)
        assert isinstance(again[0], Scaled) and torch.equal(again(IDS), model(IDS))
    for wrong, text in (
        (torch.nn.Embedding(N, 32), r"an embedding of \[700, 64\]; the model has one of \[700, 32\] there"),
        (torch.nn.Linear(64, N), "the model has a Linear there"),
    ):
        with pytest.raises(ValueError, match=text):
            bnbq.load(torch.nn.Sequential(wrong), tmp_path)


def test_gradients_reach_the_input_of_a_tied_head(tied):
    bnbq.quantize_model(tied, config())
    x = torch.randn(2, 64, requires_grad=True)
    tied.head(x).square().sum().backward()
    dense = x.detach().requires_grad_()
    torch.nn.functional.linear(dense, tied.embed.dequantize(), tied.head.bias).square().sum().backward()
    assert torch.allclose(x.grad, dense.grad, rtol=1e-3, atol=1e-2)


def test_what_is_chosen(tied):
    assert select(tied).modules.keys() == {"up", "last"} and "embed" not in select(tied).kept
    assert set(select(tied, config()).modules) == {"embed", "positions", "up", "last", "head"}
    assert set(select(tied, config(skip_modules=["positions"])).modules) == {"embed", "up", "last", "head"}
    for skipped, other, why in (("head", "embed", "tied to head, which stays float"), ("embed", "head", "output head")):
        chosen, kept = select(tied, config(skip_modules=[skipped]))  # one tensor: both or none
        assert set(chosen) == {"positions", "up", "last"}
        assert kept == {skipped: f"skip_modules: {skipped}", other: why}
    tied.head.weight = torch.nn.Parameter(tied.head.weight.detach().clone())
    assert select(tied, config()).kept == {"head": "output head"}  # not tied: the default rule
    assert "head" in select(tied, config(include_modules=["head"])).modules
    tied.embed.max_norm = 1.0
    assert select(tied, config()).kept["embed"] == "its max_norm writes to the weight"
    bnbq.quantize_model(tied, config())
    assert type(tied.embed) is torch.nn.Embedding and isinstance(tied.positions, nn.Embedding4bit)
    assert select(tied, config()).kept["positions"] == "already quantised"
    with pytest.raises(TypeError, match="cannot replace itself; use Linear4bit.from_linear or Embedding4bit.from_embedding"):
        bnbq.quantize_model(torch.nn.Embedding(4, 64), config())


def test_the_option():
    assert config().to_dict()["quantize_embeddings"] is True and "quantize_embeddings" not in BnbqConfig().to_dict()
    assert BnbqConfig.from_dict(config(bits=8).to_dict()) == config(bits=8) != BnbqConfig(bits=8)
    with pytest.raises(TypeError, match="quantize_embeddings: got 1, expected True or False"):
        BnbqConfig(quantize_embeddings=1)
    with pytest.raises(ValueError, match="bitsandbytes has no format for embeddings"):
        config(checkpoint_format="bitsandbytes")


def test_the_report_counts_a_tied_table_once(tied):
    source = copy.deepcopy(tied)
    bnbq.quantize_model(tied, config())
    rows = {row.name: row for row in bnbq.report(tied, against=source).rows}
    assert rows["embed"].format == rows["head"].format == "nf4/64" and 0 < rows["embed"].error < 0.15
    assert rows["head"].bytes == 4 * N and rows["embed"].kernel == "decodes the rows asked for"
    assert rows["head"].parameters == N and rows["embed"].parameters == N * 64


# ------------------------------------------------------------------ transformers

transformers = pytest.importorskip("transformers", minversion="5.0")

import small_models  # noqa: E402
from hf import AUTO, assert_same, file_tensors, logits, quantized  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "untied")


def embeddings(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.QuantizedEmbedding)}


def is_tied(model):
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return all(getattr(head, name) is getattr(table, name) for name in table.packed_spec())


ON = dict(quantize_embeddings=True)


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_a_tied_checkpoint_loads_saves_and_loads(llama, tmp_path, settings):
    dense = AUTO.from_pretrained(llama)
    model, info = quantized(llama, {**ON, **settings}, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and is_tied(model)
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    assert storages(model) == bnbq.get_memory_footprint(model) < (0.3 if settings.get("bits") != 8 else 0.55) * storages(dense)
    assert (logits(model) - logits(dense)).norm() < 0.3 * logits(dense).norm()
    model.save_pretrained(tmp_path)
    names = {name for name in file_tensors(tmp_path) if "embed" in name or "head" in name}
    assert names == {f"model.embed_tokens.{leaf}" for leaf in ("like", *model.lm_head.packed_spec())}
    again, info = AUTO.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and is_tied(again)
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model)) and storages(again) == storages(model)
    in_memory = copy.deepcopy(dense)
    bnbq.quantize_model(in_memory, bnbq.BnbqConfig(**ON, **settings))
    assert_same(in_memory, model)
    in_memory.save_pretrained(tmp_path / "memory")
    assert_same(AUTO.from_pretrained(tmp_path / "memory"), model)
    for copied in (copy.deepcopy(model), in_memory):
        copied.tie_weights()
        assert is_tied(copied) and torch.equal(logits(copied), logits(model))
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 14)


def test_dequantize_restores_the_tie(llama, tmp_path):
    model = quantized(llama, ON)
    expected = logits(model)
    back = model.dequantize()
    assert type(back.model.embed_tokens) is torch.nn.Embedding and back.lm_head.weight is back.model.embed_tokens.weight
    assert (logits(back) - expected).norm() < 0.03 * expected.norm()
    back.save_pretrained(tmp_path)
    assert "lm_head.weight" not in file_tensors(tmp_path)
    again = AUTO.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and torch.equal(logits(again), logits(back))


@pytest.mark.parametrize("settings", [dict(), dict(bits=8)], ids=str)
def test_an_untied_head_is_quantised_on_request(untied, tmp_path, settings):
    model = quantized(untied, {**ON, **settings})
    assert list(embeddings(model)) == ["model.embed_tokens"] and type(model.lm_head) is torch.nn.Linear
    both = quantized(untied, {**ON, **settings, "include_modules": ["lm_head"]})
    head = quantized(untied, {**settings, "include_modules": ["lm_head"]})
    assert isinstance(both.lm_head, nn.QuantizedLinear) and not is_tied(both) and embeddings(both)
    assert isinstance(head.lm_head, nn.QuantizedLinear) and not embeddings(head)
    for i, one in enumerate((model, both, head)):
        one.save_pretrained(tmp_path / str(i))
        again = AUTO.from_pretrained(tmp_path / str(i))
        assert_same(again, one)
        assert torch.equal(logits(again), logits(one))


def test_a_file_may_have_the_head_or_both(llama, tmp_path):
    from safetensors.torch import save_file

    tensors = file_tensors(llama)
    name = "model.embed_tokens.weight"
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    expected = quantized(llama, ON)
    for folder, extra in (
        ("head", {"lm_head.weight": tensors[name]}),
        ("both", {"lm_head.weight": tensors[name], name: tensors[name].clone()}),
        ("different", {"lm_head.weight": -tensors[name], name: tensors[name]}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((llama / "config.json").read_bytes())
        save_file({**others, **extra}, tmp_path / folder / "model.safetensors", {"format": "pt"})
        model, info = quantized(tmp_path / folder, ON, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not model.model.embed_tokens.like.any()
        assert torch.equal(model.model.embed_tokens.qweight, expected.lm_head.qweight)
        if folder == "different":  # the config is wrong, as transformers says: two tables, both quantised
            other = torch.nn.Linear(64, 259, bias=False)
            other.weight = torch.nn.Parameter(-tensors[name])
            assert torch.equal(model.lm_head.qweight, nn.Linear4bit.from_linear(other).qweight)
            assert model.lm_head.absmax is not model.model.embed_tokens.absmax
            model.save_pretrained(tmp_path / "out")
            assert_same(AUTO.from_pretrained(tmp_path / "out"), model)
        else:
            assert is_tied(model) and torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("settings", [ON, {**ON, "bits": 8}], ids=str)
def test_resizing(llama, untied, settings):
    """A quantised table cannot grow; the model says so and is as it was. A head on its own becomes float."""
    for source in (llama, untied):
        model = quantized(source, settings)
        expected = logits(model)
        with pytest.raises(ValueError, match="resize the embeddings of the float model, before it is quantised"):
            model.resize_token_embeddings(300)
        assert torch.equal(logits(model), expected) and model.config.vocab_size == 259
        model.resize_token_embeddings(259)
        assert torch.equal(logits(model), expected)
    model = quantized(untied, {"include_modules": ["lm_head"]})
    expected = logits(model)
    model.resize_token_embeddings(300)
    assert type(model.lm_head) is torch.nn.Linear and logits(model).shape[-1] == 300
    assert (logits(model)[..., :259] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("settings", [ON, {**ON, "double_quant": True}], ids=str)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload(llama, tmp_path, settings, where):
    expected = quantized(llama, settings)
    device_map = {"model.embed_tokens": where, "lm_head": where, "model.layers": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
    for source in (llama, tmp_path / "packed"):
        model = quantized(source, settings, device_map=device_map, offload_folder=tmp_path / "offload")
        assert torch.equal(logits(model), logits(expected))
        assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 12)
        expected.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again")
    assert_same(AUTO.from_pretrained(tmp_path / "again"), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device_map", [None, {"model": "disk", "lm_head": "disk"}], ids=["cpu", "disk"])
def test_load_and_quantize(llama, tmp_path, packed, device_map):
    accelerate = pytest.importorskip("accelerate")
    expected = quantized(llama, ON)
    if packed:
        expected.save_pretrained(tmp_path / "packed")
    with accelerate.init_empty_weights():
        model = AUTO.from_config(transformers.AutoConfig.from_pretrained(llama), dtype=torch.bfloat16)
    location = tmp_path / "packed" if packed else llama
    model = bnbq.load_and_quantize(model, bnbq.BnbqConfig(**ON), location, device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(expected))
    if device_map is None:
        assert is_tied(model) and model.dtype == torch.bfloat16 and storages(model) == storages(expected)


def test_load_and_quantize_ties_any_module(tied, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    bnbq.quantize_model(tied, config())
    for i, dropped in enumerate(("head.weight", "embed.weight")):  # which one the file has is chance
        save_file({k: v for k, v in state.items() if k != dropped}, tmp_path / f"{i}.safetensors")
        with accelerate.init_empty_weights():
            empty = Tied()
        empty.head.weight = empty.embed.weight
        model = bnbq.load_and_quantize(empty, config(), tmp_path / f"{i}.safetensors")
        assert model.head.qweight is model.embed.qweight and torch.equal(model(IDS), tied(IDS))


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_streaming_gives_the_same_files(llama, tmp_path, settings):
    from bnbq.stream import quantize_checkpoint

    summary = quantize_checkpoint(llama, tmp_path / "out", BnbqConfig(**ON, **settings))
    assert summary.kept == [] and "15 of 15 linear layers and embeddings" in summary.text()
    assert_same(AUTO.from_pretrained(tmp_path / "out"), quantized(llama, {**ON, **settings}))


def test_lora_on_a_quantised_embedding(llama):
    peft = pytest.importorskip("peft")
    model = quantized(llama, ON, dtype=torch.float32)
    before, plain = model.lm_head.qweight.clone(), logits(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    changed = logits(model)
    model(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_embedding_A" in name for name in grads) and all(g.isfinite().all() for g in grads.values())
    assert torch.equal(model.base_model.model.lm_head.qweight, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert (changed - plain).norm() > 0.01 * plain.norm()


FAMILIES = {
    "scaled": (  # a subclass that multiplies the rows by a buffer that no file has
        "Gemma3ForCausalLM",
        lambda t: t.Gemma3TextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64
        ),
        {"model.embed_tokens"},
        set(),
    ),
    "three tables": (  # one table under four names
        "BartForConditionalGeneration",
        lambda t: t.BartConfig(
            d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
            decoder_ffn_dim=128, vocab_size=64, max_position_embeddings=32, scale_embedding=True,
        ),
        {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"},
        {"model.encoder.embed_positions", "model.decoder.embed_positions"},
    ),
    "buckets": (
        "T5ForConditionalGeneration",
        lambda t: t.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0),
        {"shared", "encoder.embed_tokens", "decoder.embed_tokens"},
        {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias" for part in ("encoder", "decoder")},
    ),
    "biased head": (
        "BertForMaskedLM",
        lambda t: t.BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64),
        {"bert.embeddings.word_embeddings"},
        {"bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings"},
    ),
    "positions": (
        "GPT2LMHeadModel",
        lambda t: t.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=64),
        {"transformer.wte"},
        {"transformer.wpe"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [dict(), dict(bits=8)], ids=str)
def test_families(tmp_path, family, settings):
    name, make, tables, others = FAMILIES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(make(transformers)).save_pretrained(tmp_path / "float")
    dense = kind.from_pretrained(tmp_path / "float")
    inputs = dict(input_ids=IDS, **(dict(decoder_input_ids=IDS) if dense.config.is_encoder_decoder else {}))

    @torch.no_grad()
    def run(model):
        return model(**inputs).logits

    model, info = kind.from_pretrained(
        tmp_path / "float", quantization_config=bnbq.BnbqConfig(**ON, **settings), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and is_tied(model)
    floats = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)} - embeddings(model).keys()
    assert set(embeddings(model)) == tables and floats == others
    assert {type(m.to_embedding()) for m in embeddings(model).values()} == {type(dense.get_submodule(n)) for n in tables}
    assert (run(model) - run(dense)).norm() < (0.4 if not settings else 0.05) * run(dense).norm()
    model.save_pretrained(tmp_path / "packed")
    again, info = kind.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)
    assert torch.equal(run(again), run(model)) and storages(again) == storages(model) == bnbq.get_memory_footprint(model)
    in_memory = copy.deepcopy(dense)
    bnbq.quantize_model(in_memory, bnbq.BnbqConfig(**ON, **settings))
    assert_same(in_memory, model)
    back = in_memory.dequantize()
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    assert len(list(back.parameters())) == len(list(dense.parameters())) and run(back).isfinite().all()
