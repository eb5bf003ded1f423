"""State does not matter: any sequence of uses leaves a layer's bytes, outputs and gradients bit-identical.

Hypothesis draws sequences of the rules below, for every format and instruction set. A model of the layer is kept
beside it: the packed bytes it started with, and the bias after the casts so far (a cast to a narrower dtype changes
the bias for good, as in any module). After every step the layer must be what the model says, and its outputs and
gradients those that a layer built afresh from the same bytes gives.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from bnbq import _bnbq, experts, nn
from bnbq.packed import BITS, protect_scales

N = 40


class AsLayer:
    """Experts that look like a layer: a fixed routing that leaves one of three out, the weights below each other."""

    def __init__(self, in_features, **settings):
        super().__init__(3, in_features, N, **settings)
        self.quantize_(torch.randn(self.weight_shape))

    def forward(self, x):
        return super().forward(x, torch.tensor([len(x) // 2, len(x) // 2, len(x)]))

    def dequantize(self, dtype=None):
        return super().dequantize(dtype).reshape(-1, self.in_features)

    @property
    def weight(self):
        return self.dequantize()


class Routed4bit(AsLayer, experts.Experts4bit):
    pass


class Routed8bit(AsLayer, experts.Experts8bit):
    pass


LAYERS = {
    "nf4": lambda: nn.Linear4bit(128, N),
    "nf4 double": lambda: nn.Linear4bit(128, N, double_quant=True),
    "nf4 flat": lambda: nn.Linear4bit(100, N),
    "nf4 odd, double": lambda: nn.Linear4bit(75, N, double_quant=True, bias=False),
    "fp4": lambda: nn.Linear4bit(128, N, quant_type="fp4", blocksize=32),
    "fp4 double, bf16": lambda: nn.Linear4bit(128, N, quant_type="fp4", double_quant=True, compute_dtype="bfloat16"),
    "int4": lambda: nn.Linear4bit(192, N, quant_type="int4"),
    "int4 flat, double": lambda: nn.Linear4bit(96, N, quant_type="int4", double_quant=True),
    "int8": lambda: nn.Linear8bitLt(128, N),
    "int8 no outliers": lambda: nn.Linear8bitLt(96, N, threshold=0.0, bias=False),
    "int8 blocks": lambda: nn.Linear8bitLt(100, N, blocksize=32),
    "experts nf4 double": lambda: Routed4bit(128, double_quant=True),
    "experts fp4 flat, transposed": lambda: Routed4bit(100, quant_type="fp4", transposed=True),
    "experts int8": lambda: Routed8bit(128),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 3, 20)


class Uses(RuleBasedStateMachine):
    """Everything that is done to a layer in its life."""

    build = None  # set by the test
    compiled = False  # whether torch.compile is among the uses

    @initialize()
    def start(self):
        torch.manual_seed(0)
        self.layer = type(self).build()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                assert parameter.dtype != torch.float32 or parameter.isfinite().all()
        self.packed = {name: self.layer._parameters[name].detach().clone() for name in self.layer.packed_spec()}
        self.bias = None if self.layer.bias is None else self.layer.bias.detach().clone()
        self.inputs = {
            m: torch.randn(m, self.layer.in_features, generator=torch.Generator().manual_seed(m)) * 3 for m in ROWS
        }
        self.gradients = {m: torch.randn(m, N, generator=torch.Generator().manual_seed(100 + m)) for m in ROWS}
        self.answers = {}

    # -------------------------------------------------------------- what must be

    def fresh(self):
        """A layer that has seen nothing, of the same bytes."""
        layer = type(self).build()
        layer.load_state_dict(self.packed, strict=False)
        layer.bias = None if self.bias is None else torch.nn.Parameter(self.bias.clone())
        return layer

    def expected(self, m: int, dtype: torch.dtype):
        """Output and gradients of a fresh layer."""
        if (m, dtype) not in self.answers:
            self.answers[m, dtype] = differentiate(self.fresh(), self.inputs[m].to(dtype), self.gradients[m].to(dtype))
        return self.answers[m, dtype]

    @invariant()
    def bytes_are_the_same(self):
        if not hasattr(self, "layer"):
            return
        assert set(self.layer.state_dict()) == set(self.packed) | ({"bias"} if self.bias is not None else set())
        found = self.layer.packed_tensors()
        for name, before in self.packed.items():
            parameter = self.layer._parameters[name]
            assert type(parameter) is torch.nn.Parameter and not parameter.requires_grad
            assert found[name].dtype == before.dtype and torch.equal(found[name], before), name
        if self.bias is not None:
            assert self.layer.bias.dtype == self.bias.dtype and torch.equal(self.layer.bias, self.bias)

    # -------------------------------------------------------------- uses

    @rule(
        m=st.sampled_from(ROWS),
        dtype=st.sampled_from(DTYPES),
        mode=st.sampled_from((torch.no_grad, torch.inference_mode, torch.enable_grad)),
    )
    def forward(self, m, dtype, mode):
        with mode():
            y = self.layer(self.inputs[m].to(dtype))
        assert torch.equal(y, self.expected(m, dtype)[0])

    @rule(m=st.sampled_from(ROWS), dtype=st.sampled_from(DTYPES))
    def forward_and_backward(self, m, dtype):
        got = differentiate(self.layer, self.inputs[m].to(dtype), self.gradients[m].to(dtype))
        for a, b in zip(got, self.expected(m, dtype), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    @rule(training=st.booleans())
    def train_or_eval(self, training):
        self.layer.train(training)

    @rule(dtype=st.sampled_from(DTYPES), how=st.sampled_from(("to", "method", "device and dtype", "module")))
    def cast(self, dtype, how):
        if how == "to":
            self.layer.to(dtype)
        elif how == "method":
            {torch.float32: self.layer.float, torch.bfloat16: self.layer.bfloat16, torch.float16: self.layer.half}[
                dtype
            ]()
        elif how == "device and dtype":
            self.layer.to("cpu", dtype)
        else:
            torch.nn.ModuleList([self.layer]).to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)
        self.answers.clear()
        assert self.layer.weight.dtype == dtype

    @rule(protect=st.booleans())
    def protect_scales(self, protect):
        protect_scales(self.layer, protect)

    @rule(dtype=st.sampled_from(DTYPES))
    def cast_every_parameter(self, dtype):
        """As DeepSpeed does, which is what scales are protected from."""
        if BITS not in {parameter.dtype for parameter in self.layer.parameters()}:
            return
        for parameter in self.layer.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)
        self.answers.clear()

    @rule(assign=st.booleans())
    def load_what_it_has(self, assign):
        self.layer.load_state_dict(self.layer.state_dict(), assign=assign)

    @rule(assign=st.booleans(), through_file=st.booleans())
    def save_and_load_into_a_fresh_layer(self, assign, through_file):
        state = self.layer.state_dict()
        if through_file:
            state = through(torch.save, lambda file: torch.load(file, weights_only=True), state)
        fresh = type(self).build()
        if not assign and self.bias is not None:
            fresh.to(self.bias.dtype)
        fresh.load_state_dict(state, assign=assign)
        fresh.train(self.layer.training)
        self.layer = fresh

    @rule()
    def deepcopy(self):
        self.layer = copy.deepcopy(self.layer)

    @rule(how=st.sampled_from(("pickle", "torch.save")))
    def pickle(self, how):
        if how == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            self.layer = through(torch.save, lambda file: torch.load(file, weights_only=False), self.layer)

    @rule()
    def read_the_weight(self):
        w = self.layer.weight
        assert torch.equal(w.data.float(), self.layer.dequantize().float()) and w.data.shape == w.shape
        repr(self.layer), copy.deepcopy(w), (w @ w.T).sum()

    @rule()
    def share_memory(self):
        self.layer.share_memory()

    @rule()
    def zero_grad_and_freeze(self):
        self.layer.zero_grad()
        self.layer.requires_grad_(False)
        if self.bias is not None:
            self.layer.bias.requires_grad_(True)

    @rule(m=st.sampled_from(ROWS), dtype=st.sampled_from(DTYPES))
    def compile(self, m, dtype):
        if not self.compiled:
            return
        torch.compiler.reset()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            y = torch.compile(self.layer, backend="aot_eager", fullgraph=True)(self.inputs[m].to(dtype))
        assert torch.equal(y, self.expected(m, dtype)[0])


def differentiate(layer, x, gy):
    """Output, gradient to the input and gradient to the bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gy)
    return y.detach(), x.grad, None if layer.bias is None else layer.bias.grad.clone()


def through(save, load, value):
    file = io.BytesIO()
    save(value, file)
    file.seek(0)
    return load(file)


def run(name: str, examples: int, steps: int, compiled: bool = False, shrink: bool = True) -> None:
    machine = type(
        "Uses_" + name.replace(" ", "_").replace(",", ""),
        (Uses,),
        {"build": staticmethod(LAYERS[name]), "compiled": compiled},
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


@pytest.mark.parametrize("name", LAYERS)
def test_any_sequence_of_uses(name, isa):
    run(name, examples=12, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_long_sequences_with_compile(name):
    run(name, examples=10, steps=30, compiled=True, shrink=False)  # compiling takes long


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_machine_notices_a_layer_that_writes(name, monkeypatch):
    """The test of the test: what bitsandbytes 0.50 does on a CPU, rounding its scales in forward, is caught."""
    kind = type(LAYERS[name]())
    forward = kind.forward

    def rounding_forward(self, x):
        self._parameters["absmax"] = torch.nn.Parameter(self.absmax.bfloat16().float(), requires_grad=False)
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", rounding_forward)
    with pytest.raises(AssertionError):
        run(name, examples=6, steps=20, shrink=False)


def test_the_machine_runs_every_instruction_set():
    assert _bnbq.isas()[0] == "scalar" and _bnbq.isa() in _bnbq.isas()
