"""report, footprints, parameter counts and explain."""

import copy
import json

import pytest
import torch
from torch import nn as torch_nn

from bnbq import _bnbq, nn
from bnbq.config import BnbqConfig
from bnbq.replace import quantize_model
from bnbq.report import count_parameters, explain, get_memory_footprint, print_trainable_parameters, report

pytestmark = pytest.mark.filterwarnings("ignore:quantize_model. only")


class Net(torch_nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch_nn.Embedding(50, 64)
        self.blocks = torch_nn.ModuleList(
            [torch_nn.Sequential(torch_nn.Linear(64, 128), torch_nn.Linear(128, 64, bias=False)) for _ in range(3)]
        )
        self.lm_head = torch_nn.Linear(64, 50, bias=False)
        self.register_buffer("table", torch.zeros(10))


@pytest.fixture
def float_net():
    torch.manual_seed(0)
    return Net()


def by_name(result) -> dict:
    return {row.name: row for row in result.rows}


def test_bytes_are_exact(float_net):
    net = copy.deepcopy(float_net)
    result = quantize_model(net)
    expected = (50 * 64 + 50 * 64 + 10) * 4 + 3 * (2 * 64 * 128 * (0.5 + 4 / 64) + 128 * 4)
    assert get_memory_footprint(net) == result.bytes == expected
    assert result.bytes_as_float == get_memory_footprint(float_net)
    assert result.bits == 4.5 and result.fraction == 3 * (2 * 64 * 128 + 128) * 4 / result.bytes_as_float


@pytest.mark.parametrize(
    "config, form, bits",
    [
        (BnbqConfig(), "nf4/64", 4.5),
        (BnbqConfig(blocksize=32, quant_type="int4"), "int4/32", 5.0),
        (BnbqConfig(double_quant=True), "nf4/64+dq", 4 + 8 / 64 + 2 * 32 / (64 * 128)),
        (BnbqConfig(bits=8), "int8/row", 8 + 32 / 64),
        (BnbqConfig(bits=8, blocksize=64), "int8/64", 8.5),
    ],
)
def test_bits_per_weight(float_net, config, form, bits):
    quantize_model(float_net, config)
    row = by_name(report(float_net))["blocks.0.0"]
    assert row.format == form and row.bits == pytest.approx(bits) and row.quantized and row.kernel and not row.why


def test_rows_say_why(float_net):
    float_net.experts = torch_nn.Parameter(torch.zeros(4, 8, 8))
    float_net.lm_head.weight = float_net.embed.weight
    quantize_model(float_net, BnbqConfig(skip_modules=["blocks.2"]))
    rows = by_name(report(float_net))  # found again from the settings that the model carries
    assert (
        rows["embed"].why == "embedding"
        and rows["blocks.2.0"].why == "skip_modules: blocks.2"
        and rows[""].why == "3-D expert weights outside of Transformers' experts interface"
    )
    assert rows["lm_head"].why == "tied to embed.weight" and rows["lm_head"].bytes == 0
    assert sum(row.bytes for row in rows.values()) == get_memory_footprint(float_net)


def test_text_groups_like_layers(float_net):
    quantize_model(float_net)
    text = str(report(float_net))
    assert text.splitlines()[0] == report(float_net).summary()
    assert "blocks.*.* x6" in text and "Linear4bit" in text and "output head" in text and "error" not in text
    assert "blocks.1.0 " in report(float_net).text(every=True)
    summary = report(float_net).summary()
    assert (
        summary.startswith("6 of 7 linear layers quantised to nf4/64: ")
        and summary.endswith("; kept: lm_head")
        and "4.50 bits" in summary
    )


def test_of_a_float_model(float_net):
    result = report(float_net)
    assert result.summary().startswith("0 of 7 linear layers quantised") and not result.quantized and result.bits == 0
    assert by_name(result)["lm_head"].why == "not quantised"


def test_against_the_float_model(float_net):
    net = copy.deepcopy(float_net)
    quantize_model(net)
    result = report(net, against=float_net)
    for row in result.quantized:
        weight = float_net.get_submodule(row.name).weight
        assert row.error == pytest.approx(
            ((net.get_submodule(row.name).weight - weight).norm() / weight.norm()).item(), rel=1e-4
        )
    assert "error" in str(result) and by_name(result)["embed"].error is None
    with pytest.raises(ValueError, match=r"blocks.0.0"):
        report(net, against=torch_nn.Sequential(torch_nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"blocks.0.0 is \[128, 64\], in against it is \[3, 3\]"):
        report(
            net,
            against=torch_nn.ModuleDict({"blocks": torch_nn.Sequential(torch_nn.Sequential(torch_nn.Linear(3, 3)))}),
        )


def test_is_json(float_net):
    quantize_model(float_net, BnbqConfig(bits=8))
    values = json.loads(json.dumps(report(float_net, against=Net()).to_dict()))
    assert values["bytes"] == get_memory_footprint(float_net) and len(values["rows"]) == 9


def test_quantised_layers_only():
    layer = nn.Linear4bit(64, 8)
    result = report(layer)
    assert [row.name for row in result.rows] == [""] and "1 of 1" in result.summary()


# ------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    "config", [BnbqConfig(), BnbqConfig(double_quant=True), BnbqConfig(bits=8)], ids=["nf4", "dq", "int8"]
)
def test_parameters_are_logical(float_net, config, capsys):
    total = count_parameters(float_net)
    assert total == sum(p.numel() for p in float_net.parameters()) == count_parameters(float_net, trainable=True)
    biases = 3 * 128
    quantize_model(float_net, config)
    assert count_parameters(float_net) == total
    assert count_parameters(float_net, trainable=True) == 50 * 64 * 2 + biases
    assert count_parameters(float_net, trainable=False) == total - 50 * 64 * 2 - biases
    for parameter in float_net.parameters():
        parameter.requires_grad_(False)
    float_net.lm_head.weight.requires_grad_(True)
    print_trainable_parameters(float_net)
    assert (
        capsys.readouterr().out
        == f"trainable params: {50 * 64:,} || all params: {total:,} || trainable%: {100 * 50 * 64 / total:.4f}\n"
    )


def test_tied_parameters_count_once(float_net):
    float_net.lm_head.weight = float_net.embed.weight
    assert count_parameters(float_net) == sum(p.numel() for p in float_net.parameters())
    assert get_memory_footprint(float_net) == sum(p.numel() * 4 for p in float_net.parameters()) + 40


# ------------------------------------------------------------------ explain


def test_explain_names_the_kernel_in_use(isa):
    for layer, family in ((nn.Linear4bit(64, 8), "q4"), (nn.Linear8bitLt(64, 8), "s8")):
        used = next(row["isa"] for row in _bnbq.rows() if row["family"] == family and row["in_use"])
        answer = explain(layer)
        assert answer.kernel == f"{family} {used}" and answer.compute_dtype == "float32"
        assert answer.kernel in str(answer) and len(answer.reasons) >= 1
        for row in [row for row in _bnbq.rows() if row["family"] == family and row["missing"]]:
            assert any(row["isa"] in reason and "lacks" in reason for reason in answer.reasons)


def test_explain_reasons():
    assert (
        "generic path" in str(explain(nn.Linear4bit(100, 8)))
        and "blocks cross rows" in explain(nn.Linear4bit(100, 8)).kernel
    )
    layer = nn.Linear4bit(64, 8, compute_dtype="bfloat16")
    assert explain(layer, m=1).compute_dtype == "bfloat16" and any(
        "bf16" in reason for reason in explain(layer, 1).reasons
    )
    assert "no outliers" in str(explain(nn.Linear8bitLt(64, 8, threshold=0))) and "at least 6" in str(
        explain(nn.Linear8bitLt(64, 8))
    )
    assert explain(nn.Linear4bit(64, 8, device="meta")).kernel.startswith("none")


def test_explain_knows_which_products_round_to_bf16(isa):
    """fp32 kernels give each bf16 result exactly rounded where one product is summed; bf16 ones round twice."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 64, bias=False)
    layer = nn.Linear4bit.from_linear(dense, compute_dtype="bfloat16")
    weight = layer.dequantize(torch.float32)
    for m in (1, 4, 5, 9, 10, 16, 17):
        x = torch.eye(64)[:m].bfloat16() * 1.5
        exact = (x.float() @ weight.t()).bfloat16()
        said = "the fp32 kernel" in str(explain(layer, m))
        assert torch.equal(layer(x), exact) == said, m


def test_explain_names_int8_activations(isa):
    used = next(row["isa"] for row in _bnbq.rows() if row["family"] == "w4a8" and row["in_use"])
    answer = explain(nn.Linear4bit(64, 8, activations="int8"))
    assert answer.kernel == f"w4a8 {used}, int8 activations" and "costs quality" in str(answer)
    assert "int8 activations" in str(report(torch_nn.Sequential(nn.Linear4bit(64, 8, activations="int8"))))
    assert "w4a8" not in explain(nn.Linear4bit(100, 8, activations="int8")).kernel


def test_explain_when_batch_invariant(batch_invariant):
    assert "batch invariant" in str(explain(nn.Linear4bit(64, 8, compute_dtype="bfloat16")))


@pytest.mark.parametrize(
    "layer, m, kind, text",
    [
        (torch_nn.Linear(4, 4), None, TypeError, "got Linear"),
        (nn.Linear4bit(64, 8, device="meta"), -1, ValueError, "m is -1"),
        (nn.Linear4bit(64, 8, device="meta"), 1.5, ValueError, "m is 1.5"),
    ],
)
def test_explain_refuses(layer, m, kind, text):
    with pytest.raises(kind, match=text):
        explain(layer, m)
