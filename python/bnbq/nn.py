"""Quantised linear layers for PyTorch: ``Linear4bit`` (and ``LinearNF4``, ``LinearFP4``) and ``Linear8bitLt``.
``Embedding4bit`` and ``Embedding8bit`` (embedding.py) belong to this module's interface too.

Each is a subclass of ``nn.Linear`` whose tensors are plain frozen Parameters::

    Linear4bit     qweight u8 [n, k / 2]    absmax f32 [n, k / blocksize]
                   (k % blocksize != 0: 1-D, u8 [ceil(n k / 2)] and f32 [ceil(n k / blocksize)])
      double_quant absmax u8, absmax2 f32 [ceil(blocks / 256)], absmax_offset f32 [1]
    Linear8bitLt   qweight i8 [n, k]        absmax f32 [n], or [n, ceil(k / blocksize)]
    bias           as in nn.Linear: float, trainable if you like

with n = out_features and k = in_features; reference.py defines the bytes. ``forward`` writes nothing. No cast
(``.to(dtype)``, ``.half()``) touches packed bytes or scales; a move moves everything. ``.weight`` is computed
when it is read and requantised when it is written (virtual_weight.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from . import ops
from .config import check_activations, check_threshold, parse_dtype
from .embedding import Embedding4bit, Embedding8bit, QuantizedEmbedding  # noqa: F401
from .matrix import Format4bit, Format8bit, PackedMatrix
from .packed import WEIGHT_DTYPES, PackedModule


class QuantizedLinear(PackedMatrix, nn.Linear):
    """What the quantised layers share. Subclasses give the format and how to multiply."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    # ------------------------------------------------------------------ construction

    def _build(self, in_features, out_features, bias, weight_dtype, device) -> None:
        """The tensors of a new layer: nn.Linear's own random initialisation, quantised; unfilled on meta."""
        self._check_sizes(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        dtype = self._float_dtype(weight_dtype)
        self.weight_dtype = dtype if dtype in WEIGHT_DTYPES else torch.float32
        dense = nn.Linear(in_features, out_features, bool(bias), device=device, dtype=dtype)
        # The bias comes first: transformers takes a model's dtype from its first float parameter.
        self.register_parameter("bias", dense.bias)
        self._register_packed(self.packed(dense.weight))

    @classmethod
    def from_linear(cls, module: nn.Module, **settings):
        """Quantise a float layer: nn.Linear, or transformers' Conv1D, whose weight is transposed.

        Args:
            module: left as it is; its bias Parameter (the object) is used by the new layer too.
            settings: keyword arguments of the class (``quant_type``, ``blocksize`` ...).

        The layer lies where the module's weight does (meta included) and reports its dtype unless
        ``weight_dtype`` says otherwise. Raises TypeError for other modules, ValueError for a NaN or an
        Inf in the weight, naming its index.
        """
        weight = dense_weight(module)
        settings.setdefault("weight_dtype", weight.dtype)
        layer = cls(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta", **settings)
        layer.register_parameter("bias", module.bias)
        if not weight.is_meta:
            layer.quantize_(weight)
        return layer.train(module.training)

    def reset_parameters(self) -> None:
        """nn.Linear's random initialisation, quantised."""
        fresh = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.qweight.device,
            dtype=self.weight_dtype,
        )
        if not self.qweight.is_meta:
            self.quantize_(fresh.weight.detach())
            if self.bias is not None:
                with torch.no_grad():
                    self.bias.copy_(fresh.bias)

    # ------------------------------------------------------------------ settings

    def describe(self) -> str:
        """For messages: "Linear4bit(4096, 1024, nf4)"."""
        quant_type = self.format().get("quant_type", "int8")
        return f"{type(self).__name__}({self.in_features}, {self.out_features}, {quant_type})"

    def extra_repr(self) -> str:
        settings = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self._extra_settings(),
        }
        if self.compute_dtype is not None:
            settings["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return ", ".join(f"{name}={value}" for name, value in settings.items())


class Linear4bit(Format4bit, QuantizedLinear):
    """A linear layer whose weight is stored with 4 bits per element and a scale per block.

    ``forward``: x float[..., in_features] -> [..., out_features] in x's dtype. The weight is dequantised inside the
    product; x is rounded to ``compute_dtype`` first if one is set; sums are fp32.

    Args:
        quant_type: "nf4" (Dettmers et al. 2023, QLoRA), "fp4" or "int4".
        blocksize: elements that share a scale: 32, 64, 128 ... 4096.
        double_quant: quantise the scales too (QLoRA section 3): 0.4 bits per element less at blocksize 64.
        compute_dtype: float32, bfloat16 or float16 (torch.dtype or name); None (default) is the input's dtype.
        activations: "int8" rounds x to int8 in blocks of min(blocksize, 64) columns, and the codebook with it: less
            exact, and with AVX-512 VNNI faster. Gradients stay those of the default, None. No effect where in_features
            is no multiple of blocksize, nor on a GPU.
        weight_dtype: what ``weight`` reports and dequantises to; None is torch's default dtype.
        device: "meta" makes an unfilled layer.

    ``Linear4bit(i, o)`` starts with the random weight that ``nn.Linear(i, o)`` would have, quantised.
    ``from_linear`` quantises a layer there is. Raises TypeError and ValueError for bad settings.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        compute_dtype=None,
        activations: str | None = None,
        weight_dtype: torch.dtype | None = None,
        device=None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's, which would register a dense weight
        self._set_format(quant_type, blocksize, double_quant)
        self.compute_dtype = compute_dtype
        self.activations = activations
        self._build(in_features, out_features, bias, weight_dtype, device)

    @property
    def activations(self) -> str | None:
        """None, or "int8": what inputs are rounded to beyond ``compute_dtype``."""
        return self._activations

    @activations.setter
    def activations(self, value) -> None:
        self._activations = check_activations(value, f"{type(self).__name__}.activations")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = self._parameters  # not self.qweight: nn.Module's lookup costs a microsecond
        return ops.linear4bit(
            x,
            tensors["qweight"],
            tensors["absmax"],
            self.out_features,
            tensors["bias"],
            absmax2=tensors.get("absmax2"),
            absmax_offset=tensors.get("absmax_offset"),
            quant_type=self._quant_type,
            blocksize=self._blocksize,
            compute_dtype=self._compute_dtype,
            activations=self._activations,
        )

    def _extra_settings(self):
        settings = self.format()
        return settings if self._activations is None else {**settings, "activations": self._activations}


class LinearNF4(Linear4bit):
    """``Linear4bit`` with the nf4 format."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **settings):
        super().__init__(in_features, out_features, bias, quant_type="nf4", **settings)


class LinearFP4(Linear4bit):
    """``Linear4bit`` with the fp4 format."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **settings):
        super().__init__(in_features, out_features, bias, quant_type="fp4", **settings)


class Linear8bitLt(Format8bit, QuantizedLinear):
    """A linear layer whose weight is stored as int8 with a scale per row, multiplied as LLM.int8() does.

    ``forward``: x float[..., in_features] -> [..., out_features] in x's dtype. Each row of x is quantised to int8 by
    its own absmax; columns of x that hold an element with ``|x| >= threshold`` are multiplied in float instead
    (Dettmers et al. 2022, section 3), or with ``bnbq.set_batch_invariant(True)`` those elements alone, so that a row's
    result does not depend on its neighbours. The int8 product is exact.

    Args:
        threshold: 6.0 by default; 0 for none.
        blocksize: 0 (default) is one scale per row; 32, 64 ... 4096 is one per that many columns of a row.
        compute_dtype: inputs are rounded to it first; None (default) is the input's dtype.
        weight_dtype, device: as in ``Linear4bit``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        blocksize: int = 0,
        compute_dtype=None,
        weight_dtype: torch.dtype | None = None,
        device=None,
    ):
        nn.Module.__init__(self)
        self.threshold = threshold
        self._set_format(blocksize)
        self.compute_dtype = compute_dtype
        self._build(in_features, out_features, bias, weight_dtype, device)

    @property
    def threshold(self) -> float:
        return self._threshold

    @threshold.setter
    def threshold(self, value) -> None:
        self._threshold = check_threshold(value, f"{type(self).__name__}.threshold")

    @property
    def state(self) -> SimpleNamespace:
        """For code that knows bitsandbytes' ``state``: SCB holds the scales. What is assigned to it is forgotten."""
        return SimpleNamespace(
            SCB=self.packed_tensors()["absmax"], CB=None, CxB=None, has_fp16_weights=False, threshold=self._threshold
        )

    @state.setter
    def state(self, value) -> None:
        """PEFT hands the state of the layer that it wraps on to the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors, dtype = self._parameters, self._compute_dtype
        if dtype is not None and dtype != x.dtype:
            x = x.to(dtype).to(x.dtype)
        return ops.linear8bitlt(
            x,
            tensors["qweight"],
            tensors["absmax"],
            tensors["bias"],
            threshold=self._threshold,
            blocksize=self._blocksize,
        )

    def _extra_settings(self):
        return {"threshold": self._threshold, "blocksize": self._blocksize}


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a float linear layer as [out_features, in_features]; transformers' Conv1D stores it transposed.

    TypeError for any other module.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return weight.detach()
    if is_conv1d(module):
        return weight.detach().t()
    raise TypeError(f"from_linear: got {type(module).__name__}, expected nn.Linear or transformers' Conv1D")


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2's linear layer), recognised without importing transformers."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in type(module).__mro__
    )


def set_compute_dtype(model: nn.Module, dtype) -> int:
    """Set ``compute_dtype`` of every quantised layer of a model; None is the input's dtype. Returns their number.

    Raises TypeError or ValueError for a dtype that is not float32, bfloat16 or float16, ValueError for a model
    without quantised layers.
    """
    dtype = parse_dtype(dtype, "set_compute_dtype: dtype")
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    if not layers:
        raise ValueError(f"set_compute_dtype: {type(model).__name__} has no quantised layer")
    for layer in layers:
        layer.compute_dtype = dtype
    return len(layers)


def set_activations(model: nn.Module, activations: str | None) -> int:
    """Set ``activations`` of every 4-bit layer of a model: "int8", or None for no rounding. Returns their number.

    Raises TypeError or ValueError for anything else, ValueError for a model without 4-bit layers.
    """
    check_activations(activations, "set_activations: activations")
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    layers = [module for module in packed if hasattr(module, "activations")]
    if not layers:
        raise ValueError(f"set_activations: {type(model).__name__} has no 4-bit layer")
    for layer in layers:
        layer.activations = activations
    return len(layers)
