"""Quantised experts: the weights of a mixture of experts' projection, one matrix per expert, packed in one tensor each.

``Experts4bit`` and ``Experts8bit`` hold what Transformers keeps in one 3-D Parameter. Each expert is packed on its own,
as the linear layer of the same format (nn.py) would pack it, and the packed tensors are stacked::

    Experts4bit    qweight u8 [experts, n, k / 2]    absmax f32 [experts, n, k / blocksize]
                   (k % blocksize != 0: u8 [experts, ceil(n k / 2)] and f32 [experts, ceil(n k / blocksize)])
      double_quant absmax u8, absmax2 f32 [experts, ceil(blocks of one / 256)], absmax_offset f32 [experts, 1]
    Experts8bit    qweight i8 [experts, n, k]        absmax f32 [experts, n], or [experts, n, ceil(k / blocksize)]

with n = out_features and k = in_features, the dimension that the product sums over. Some models store the weight
transposed, [experts, k, n]; it is packed with k last like all others, so its blocks run along k. Biases, activations
and routing stay with the model's own module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import nn, ops_experts
from .packed import PackedModule
from .state import describe


def _setting(name: str, doc: str) -> property:
    """A setting of every expert, which lives in the layer that describes one."""
    return property(lambda self: getattr(self.one, name), lambda self, value: setattr(self.one, name, value), doc=doc)


class QuantizedExperts(PackedModule):
    """What the two formats share.

    Args:
        num_experts, in_features, out_features: of the weight, float[num_experts, out_features, in_features].
        transposed: whether the model has it as [num_experts, in_features, out_features].
        weight_dtype: what it dequantises to; None is torch's default dtype.
        device: "meta" makes an unfilled module; None (default) one of zeros.
        settings: keyword arguments of the linear layer of the same format.

    ``forward(x, ends, bias=None)``: x float[m, in_features], its rows sorted by expert, and ``ends`` int64[num_experts]
    -> float[m, out_features] in x's dtype; ops_experts.py says more. Experts without rows are not read.
    """

    layer_class: type[nn.QuantizedLinear]
    bias = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        transposed: bool = False,
        weight_dtype: torch.dtype | None = None,
        device=None,
        **settings,
    ):
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, int):
            raise TypeError(f"{type(self).__name__}: num_experts is {num_experts!r}, expected an int")
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: num_experts is {num_experts}, expected at least 1")
        # One expert without data knows the format and the settings. It is no submodule: it has nothing to move or save.
        self.__dict__["one"] = self.layer_class(
            in_features, out_features, False, weight_dtype=weight_dtype, device="meta", **settings
        )
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.transposed = transposed
        shape = (num_experts, in_features, out_features) if transposed else (num_experts, out_features, in_features)
        self._register_packed(self.packed(torch.zeros(shape, device="meta")))
        if device is None or torch.device(device).type != "meta":
            self._fill(self.packed(torch.zeros(shape, dtype=self.weight_dtype, device=device)))

    weight_dtype = _setting("weight_dtype", "the dtype of ``dequantize`` and of the float weight")
    compute_dtype = _setting("compute_dtype", "the dtype to which inputs are rounded; None is their own")
    blocksize = property(lambda self: self.one.blocksize, doc="as in the linear layer")

    @classmethod
    def from_weight(cls, weight: torch.Tensor, transposed: bool = False, **settings):
        """Quantise float[experts, n, k], or [experts, k, n] if ``transposed``; on meta an unfilled module.

        Raises TypeError and ValueError for another kind or shape, and for a NaN or an Inf.
        """
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 3:
            raise TypeError(f"{cls.__name__}: the weight is {describe(weight)}, expected float of 3 dimensions")
        experts, n, k = weight.mT.shape if transposed else weight.shape
        settings.setdefault("weight_dtype", weight.dtype)
        module = cls(experts, k, n, transposed=transposed, device="meta", **settings)
        return module if weight.is_meta else module.quantize_(weight)

    # ------------------------------------------------------------------ the packed tensors

    def packed_spec(self):
        return {name: ((self.num_experts, *shape), dtype) for name, (shape, dtype) in self.one.packed_spec().items()}

    def format(self):
        return self.one.format()

    def _pack(self, dense):
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=dense.device)
            for name, (shape, dtype) in self.packed_spec().items()
        }
        for expert, weight in enumerate(dense.mT if self.transposed else dense):
            try:
                packed = self.one._pack(weight.contiguous())
            except ValueError as error:
                raise ValueError(f"expert {expert}: {error}") from None
            for name, tensor in packed.items():
                tensors[name][expert] = tensor
        return tensors

    @torch.no_grad()
    def quantize_(self, dense: torch.Tensor):
        """Replace the weight by ``dense``, float of the shape ``weight_shape``; returns the module.

        Raises TypeError and ValueError (shape, NaN, Inf), and nothing has changed then.
        """
        self._check_dense(dense)
        if dense.is_meta:
            raise ValueError(f"{self.describe()}: the new weight is on the meta device and has no data")
        self._fill(self.packed(dense))
        return self

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Shape of the float weight, as the model has it."""
        last = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return self.num_experts, *last

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, float of the shape ``weight_shape``: fp32 values rounded once to ``dtype`` (None:
        ``weight_dtype``)."""
        return self.experts(range(self.num_experts), self.weight_dtype if dtype is None else dtype)

    def experts(self, numbers, dtype: torch.dtype) -> torch.Tensor:
        """The float weights of some experts, stacked in the order of ``numbers``, in the model's layout."""
        qweight = self._parameters["qweight"]
        if qweight.is_meta:
            return torch.empty((len(numbers), *self.weight_shape[1:]), dtype=dtype, device="meta")
        dense = torch.empty((len(numbers), *self.weight_shape[1:]), dtype=dtype, device=qweight.device)
        for place, number in enumerate(numbers):
            weight = self.expert(number).dequantize(dtype)
            dense[place] = weight.T if self.transposed else weight
        return dense

    def expert(self, number: int) -> nn.QuantizedLinear:
        """One expert as a linear layer without bias that shares its packed tensors."""
        if not -self.num_experts <= number < self.num_experts:
            raise IndexError(f"{self.describe()}: there is no expert {number}")
        one = self.one
        layer = self.layer_class(
            self.in_features, self.out_features, False, device="meta", weight_dtype=one.weight_dtype, **self.settings()
        )
        layer._register_packed({name: self._parameters[name].detach()[number] for name in self.packed_spec()})
        return layer

    @torch.no_grad()
    def __getitem__(self, index):
        """What ``weight[index]`` gives for the float weight: one expert, or those that a vector of indices names.

        Models' own loops over experts (``experts_implementation="eager"``) read their weights like this.
        """
        numbers = torch.as_tensor(index)
        if numbers.dim() > 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise TypeError(f"{self.describe()}: {describe(numbers)} as an index; wanted an int or a vector of them")
        chosen = self.experts(numbers.reshape(-1).tolist(), self.weight_dtype)
        return chosen if numbers.dim() else chosen[0]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(torch.Tensor, name):
                raise
        raise AttributeError(
            f"{self.describe()} is no tensor and has no {name!r}: other code than bnbq's tried to compute with packed "
            'experts. model.set_experts_implementation("bnbq") computes with them'
        )

    # ------------------------------------------------------------------ settings

    def settings(self) -> dict:
        """Keyword arguments of the linear layer for these settings."""
        raise NotImplementedError

    def describe(self) -> str:
        """For messages: "Experts4bit(8 x (4096, 1024), nf4)"."""
        quant_type = self.format().get("quant_type", "int8")
        return f"{type(self).__name__}({self.num_experts} x ({self.in_features}, {self.out_features}), {quant_type})"

    def extra_repr(self) -> str:
        layout = ", transposed=True" if self.transposed else ""
        return f"num_experts={self.num_experts}, {self.one.extra_repr().replace(', bias=False', '')}{layout}"


class Experts4bit(QuantizedExperts):
    """Experts in 4 bits, in one of `bnbq.nn.Linear4bit`'s formats; its arguments are keywords here too."""

    layer_class = nn.Linear4bit
    quant_type = property(lambda self: self.one.quant_type, doc='"nf4", "fp4" or "int4"')
    double_quant = property(lambda self: self.one.double_quant, doc="whether the scales are quantised")
    activations = _setting("activations", 'None, or "int8": what inputs are rounded to beyond ``compute_dtype``')

    def settings(self):
        return {**self.format(), "compute_dtype": self.compute_dtype, "activations": self.activations}

    def forward(self, x: torch.Tensor, ends: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        one = self.one
        return ops_experts.experts_linear4bit(
            x,
            ends,
            self._parameters,
            bias,
            self.out_features,
            quant_type=one.quant_type,
            blocksize=one.blocksize,
            compute_dtype=one.compute_dtype,
            activations=one.activations,
        )


class Experts8bit(QuantizedExperts):
    """Experts in int8, multiplied as `bnbq.nn.Linear8bitLt` does; its arguments are keywords here too."""

    layer_class = nn.Linear8bitLt
    threshold = _setting("threshold", "|x| from which a column of x is multiplied in float; 0 for none")

    def settings(self):
        return {**self.format(), "compute_dtype": self.compute_dtype, "threshold": self.threshold}

    def forward(self, x: torch.Tensor, ends: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops_experts.experts_linear8bitlt(x, ends, self._parameters, bias, **self.settings())


def layer_class(bits: int) -> type[QuantizedExperts]:
    """The class for a BnbqConfig's bits."""
    return Experts4bit if bits == 4 else Experts8bit




# ------------------------------------------------------------------ in a model


@dataclass(frozen=True)
class ExpertWeight:
    """A float 3-D Parameter of a module that computes through Transformers' experts interface."""

    owner: torch.nn.Module
    name: str

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.owner._parameters[self.name]

    @property
    def transposed(self) -> bool:
        """Stored as [experts, in, out]."""
        return self.owner.is_transposed


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module dispatches its forward to `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`: it then has
    the flags that say how its weights lie, whatever its class is called."""
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    return (
        all(isinstance(module.__dict__.get(flag), bool) for flag in flags)
        and hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "config")
        and hasattr(module, "num_experts")
    )


def projections(module: torch.nn.Module) -> tuple[str, str]:
    """Names of an experts module's weights: into the experts' hidden layer, and out of it."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def expert_weights(module: torch.nn.Module) -> dict[str, ExpertWeight]:
    """The float expert weights of a module by name; {} if it has none or their shapes do not fit together."""
    if not is_experts(module):
        return {}
    names = projections(module)
    shapes = []
    for name in names:
        weight = module._parameters.get(name)
        packed = module._modules.get(name)
        if isinstance(packed, QuantizedExperts):
            shapes.append(packed.weight_shape)
        elif weight is not None and weight.dim() == 3 and weight.is_floating_point():
            shapes.append(tuple(weight.shape))
        else:
            return {}
    (experts, *up), (same, *down) = shapes
    wide, narrow = (up[1], down[0]) if module.is_transposed else (up[0], down[1])
    if experts != same or experts != module.num_experts or wide != narrow * (2 if module.has_gate else 1):
        return {}
    return {name: ExpertWeight(module, name) for name in names if name in module._parameters}


def find(model: torch.nn.Module) -> dict[str, ExpertWeight]:
    """Every float expert weight of a model by its full name."""
    return {
        f"{name}.{weight.name}" if name else weight.name: weight
        for name, module in model.named_modules()
        for weight in expert_weights(module).values()
    }


def float_part(model: torch.nn.Module, name: str):
    """What has this name: a module, or an expert weight."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    return ExpertWeight(parent, leaf) if leaf in parent._parameters else model.get_submodule(name)
