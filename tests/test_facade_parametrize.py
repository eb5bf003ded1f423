"""`bnbq.bitsandbytes.nn.parametrize`: Parameters of any module in 4 bits, by bitsandbytes' state-dict keys."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import parametrize  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import bnbq.bitsandbytes as bnb  # noqa: E402
from bnbq.bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized  # noqa: E402


class Experts(torch.nn.Module):
    """Reads its weight once per expert."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 32, 64, generator=generator))
        self.scale = torch.nn.Parameter(torch.ones(32))

    def forward(self, x):
        return sum((x @ self.gate_up_proj[i].t()).tanh() for i in range(3)) * self.scale


def quantized(**settings):
    module = Experts()
    replace_parameter_4bit(module, "gate_up_proj", **settings)
    return module


SETTINGS = [dict(), dict(compress_statistics=True, quant_type="fp4", blocksize=128)]


@pytest.mark.parametrize("settings", SETTINGS, ids=["nf4", "fp4-dq-128"])
def test_a_parameter_is_packed_and_decoded_when_it_is_read(settings):
    module, dense = quantized(**settings), Experts().gate_up_proj.data
    packed, state = bnb.functional.quantize_4bit(dense, **{"quant_type": "nf4", **settings})
    wanted = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(module.gate_up_proj, wanted) and not module.gate_up_proj.requires_grad
    assert torch.equal(module.parametrizations.gate_up_proj.original, packed)
    assert module.parametrizations.gate_up_proj[0].quant_state == state
    plain, x = Experts(), torch.randn(2, 64, requires_grad=True)
    plain.gate_up_proj.data = wanted
    y, z = module(x), plain(x)
    assert torch.equal(y, z)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, module.scale)), torch.autograd.grad(z.sum(), (x, plain.scale)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("settings", SETTINGS, ids=["nf4", "fp4-dq-128"])
def test_state_dicts_are_saved_and_loaded(settings):
    """bitsandbytes' cannot be loaded, but by replace_parameter_4bit_prequantized."""
    module = torch.nn.Sequential(quantized(**settings))
    stored, wanted = module.state_dict(), module[0].gate_up_proj
    kind = settings.get("quant_type", "nf4")
    assert {"0.scale", "0.gate_up_proj", "0.gate_up_proj.absmax", "0.gate_up_proj.quant_map",
            f"0.gate_up_proj.quant_state.bitsandbytes__{kind}"} <= set(stored)
    other = torch.nn.Sequential(quantized())
    torch.nn.init.zeros_(other[0].parametrizations.gate_up_proj.original)
    assert str(other.load_state_dict(stored)) == "<All keys matched successfully>"
    assert torch.equal(other[0].gate_up_proj, wanted) and other.state_dict().keys() == stored.keys()
    assert str(other.load_state_dict({"0.scale": stored["0.scale"]}, strict=False)) == (
        "_IncompatibleKeys(missing_keys=['0.parametrizations.gate_up_proj.original'], unexpected_keys=[])")
    third = Experts()
    third.gate_up_proj = torch.nn.Parameter(stored["0.gate_up_proj"], requires_grad=False)
    statistics = {key.removeprefix("0.gate_up_proj."): value for key, value in stored.items() if "gate_up_proj." in key}
    replace_parameter_4bit_prequantized(third, "gate_up_proj", statistics, torch.device("cpu"))
    assert torch.equal(third.gate_up_proj, wanted)


@pytest.mark.parametrize("damage, message", [
    (lambda d: [d.pop(key) for key in list(d) if "gate_up_proj." in key], "gate_up_proj: QuantState.from_dict: got nothing"),
    (lambda d: d.update({"gate_up_proj.absmax": d["gate_up_proj.absmax"][1:]}), "gate_up_proj: the packed weight has .* 95 scales"),
    (lambda d: d.update(bnb.nn.LinearNF4(64, 8).to("cpu").state_dict(prefix="x.")), "Unexpected key.*x.weight"),
    (lambda d: d.update(larger(d)), "size mismatch for parametrizations.gate_up_proj.original"),
])
def test_damaged_entries_change_nothing(damage, message):
    module, entries = quantized(), dict(quantized(quant_type="fp4").state_dict())
    wanted = module.gate_up_proj
    damage(entries)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(entries)
    if "Unexpected" not in message:  # torch has loaded the rest by then
        assert torch.equal(module.gate_up_proj, wanted)


def larger(entries):
    packed, state = bnb.functional.quantize_4bit(torch.ones(4, 32, 64), quant_type="fp4")
    return {"gate_up_proj": packed, **{f"gate_up_proj.{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("change", [
    copy.deepcopy, lambda m: m.half().float(), lambda m: m.to("cpu", torch.bfloat16).float(), lambda m: m.eval(),
], ids=["deepcopy", "half", "to", "eval"])  # fmt: skip
def test_nothing_changes_the_bytes(change):
    module = quantized(compress_statistics=True)
    wanted, stored = module.gate_up_proj, {key: value.clone() for key, value in module.state_dict().items()}
    module = change(module)
    assert torch.equal(module.gate_up_proj, wanted)
    assert all(torch.equal(value, stored[key]) for key, value in module.state_dict().items())


def test_scales_follow_a_move():
    module = quantized(compress_statistics=True).to("meta")
    state = module.parametrizations.gate_up_proj[0].quant_state
    assert state.absmax.is_meta and state.state2.absmax.is_meta and module.gate_up_proj.is_meta


def test_one_call_decodes_once(monkeypatch):
    """Also after a forward that raised, and a recomputation that gradient checkpointing stopped half way: torch's cache is
    for all modules, and left open it would hold every dense weight."""
    module, x, calls = quantized(), torch.randn(2, 64, requires_grad=True), []
    decode = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: calls.append(1) or decode(*args))
    module(x)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        module(x[:, :5])
    for reentrant in (True, False):
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert parametrize._cache == {} and parametrize._cache_enabled == 0
    calls.clear()
    module.gate_up_proj, module.gate_up_proj  # noqa: B018
    assert len(calls) == 2


def test_what_cannot_be_replaced():
    module = Experts()
    module.number = 3
    with pytest.raises(AttributeError, match="Experts does not have parameter 'nonsense'"):
        replace_parameter_4bit(module, "nonsense")
    with pytest.raises(TypeError, match="'number' is not an instance of nn.Parameter"):
        replace_parameter_4bit_prequantized(module, "number", {}, "cpu")
    with pytest.raises(ValueError, match="got nothing; wanted one of"):
        replace_parameter_4bit_prequantized(module, "gate_up_proj", {}, "cpu")
    assert torch.equal(module.gate_up_proj, Experts().gate_up_proj)
