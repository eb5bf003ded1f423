"""Packed weights that stand for a float matrix [n, k]: what linear layers and embeddings share.

`PackedMatrix` computes ``.weight`` when it is read and packs what is written to it (virtual_weight.py); `Format4bit`
and `Format8bit` say what the Parameters are. A layer is one of the formats and one of nn.py's or embedding.py's
bases, which give the rest: sizes, forward, construction.
"""

from __future__ import annotations

import math

import torch

from . import ops
from .config import check_blocksize, check_bool, check_quant_type
from .ops_torch import check_finite
from .packed import WEIGHT_DTYPES, PackedModule
from .virtual_weight import VirtualWeight


class PackedMatrix(PackedModule):
    """A module whose weight is a packed matrix. The format says how to pack and unpack, the layer how large it is."""

    # ------------------------------------------------------------------ what a subclass defines

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(n, k), the shape of the float weight: its rows are outputs of a layer, entries of an embedding."""
        raise NotImplementedError

    def _unpack(self, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    # ------------------------------------------------------------------ construction

    def _check_sizes(self, **sizes) -> None:
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{type(self).__name__}: {name} is {value!r}, expected an int")
            if value < 0:
                raise ValueError(f"{type(self).__name__}: {name} is {value}, expected at least 0")

    def _float_dtype(self, weight_dtype) -> torch.dtype:
        """``weight_dtype``, or torch's default for None; TypeError for what is no float dtype."""
        dtype = torch.get_default_dtype() if weight_dtype is None else weight_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: weight_dtype is {weight_dtype!r}, expected a float dtype")
        return dtype

    @torch.no_grad()
    def tie_(self, other) -> None:
        """Use the Parameters (the objects) of another module, but for a bias, as a head does that is tied to an
        embedding.

        ValueError if the other's weight has another shape or format.
        """
        mine, theirs = (self.packed_spec(), self.format()), (other.packed_spec(), other.format())
        if mine != theirs:
            raise ValueError(f"{self.describe()} cannot share the weight of {other.describe()}")
        for name in self.tied_parameters(other):
            self._parameters[name] = other._parameters[name]

    def tied_parameters(self, other) -> list[str]:
        """Names of the Parameters that this module and one that it is tied to have in common."""
        return [name for name in self._parameters if name in other._parameters and name != "bias"]

    # ------------------------------------------------------------------ the weight

    @torch.no_grad()
    def quantize_(self, dense: torch.Tensor):
        """Replace the weight by ``dense``, float[n, k] of any strides; returns the layer.

        Quantised on the device of ``dense``, where the packed tensors then lie. On the device where they were,
        the bytes are written into the same Parameters. Raises TypeError and ValueError (shape, NaN, Inf), and
        nothing has changed then.
        """
        self._check_dense(dense)
        if dense.is_meta:
            if not self._parameters["qweight"].is_meta:
                raise ValueError(f"{self.describe()}: the new weight is on the meta device and has no data")
            return self
        self._fill(self.packed(dense))
        return self

    @torch.no_grad()
    def assign_weight(self, dense: torch.Tensor) -> None:
        """What ``layer.weight = dense`` and ``layer.weight.data = dense`` do: requantise, and report its dtype.

        Another layer's ``weight`` in the same format is taken over byte by byte, and the layer's own changes nothing
        (PEFT assigns it when it unloads): requantising int8 or double-quantised scales could move them by an ulp.
        """
        if isinstance(dense, VirtualWeight):
            other = dense._layer
            if other is self:
                return
            alike = other.packed_spec() == self.packed_spec() and other.format() == self.format()
            if alike and not other.qweight.is_meta:
                self._fill({name: other._parameters[name].detach().clone() for name in self.packed_spec()})
                self.weight_dtype = other.weight_dtype
                return
            dense = other.dequantize()
        self._check_dense(dense)
        # A plain view: requantising from a DenseWeight must not look like an operation on it.
        with torch._C.DisableTorchFunctionSubclass():
            plain = dense.detach().as_subclass(torch.Tensor)
        self.quantize_(plain)
        if plain.dtype in WEIGHT_DTYPES:
            self.weight_dtype = plain.dtype

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a plain tensor [n, k]: fp32 values rounded once to ``dtype``
        (None: ``weight_dtype``)."""
        dtype = self.weight_dtype if dtype is None else dtype
        if self._parameters["qweight"].is_meta:
            return torch.empty(self.weight_shape, dtype=dtype, device="meta")
        return self._unpack(dtype) if dtype in WEIGHT_DTYPES else self._unpack(torch.float32).to(dtype)

    @property
    def weight(self):
        """The weight, float[n, k] in ``weight_dtype``: dequantised when its values are read,
        requantised when it is assigned or written in place. See virtual_weight.py."""
        return self.dequantize() if torch.compiler.is_compiling() else VirtualWeight(self)

    def __setattr__(self, name, value):
        if name == "weight":  # nn.Module would register a Parameter of this name
            self.assign_weight(value)
        else:
            super().__setattr__(name, value)


class Format4bit(PackedMatrix):
    """4 bits per element and a scale per block; blocks run over the flattened weight."""

    def _set_format(self, quant_type, blocksize, double_quant) -> None:
        self._quant_type = check_quant_type(quant_type)
        self._blocksize = check_blocksize(blocksize)
        self._double_quant = check_bool(double_quant, "double_quant")

    # The format belongs to the bytes: it cannot be assigned.
    quant_type = property(lambda self: self._quant_type, doc='"nf4", "fp4" or "int4"')
    blocksize = property(lambda self: self._blocksize, doc="elements per scale")
    double_quant = property(lambda self: self._double_quant, doc="whether the scales are quantised")

    def packed_spec(self):
        (n, k), blocksize = self.weight_shape, self._blocksize
        blocks = math.ceil(n * k / blocksize)
        whole = k % blocksize == 0
        scales = (n, k // blocksize) if whole else (blocks,)
        spec = {
            "qweight": ((n, k // 2) if whole else (math.ceil(n * k / 2),), torch.uint8),
            "absmax": (scales, torch.uint8 if self._double_quant else torch.float32),
        }
        if self._double_quant:
            spec["absmax2"] = ((math.ceil(blocks / 256),), torch.float32)
            spec["absmax_offset"] = ((1,), torch.float32)
        return spec

    def format(self):
        return {"quant_type": self._quant_type, "blocksize": self._blocksize, "double_quant": self._double_quant}

    def _pack(self, dense):
        packed = ops.quantize_4bit(dense, self._quant_type, self._blocksize, self._double_quant)
        check_finite("quantize_4bit", dense, packed.absmax_offset if self._double_quant else packed.absmax)
        return {name: getattr(packed, name) for name in self.packed_spec()}

    def _unpack(self, dtype):
        tensors = self._parameters
        return ops.dequantize_4bit(
            tensors["qweight"],
            tensors["absmax"],
            self.weight_shape,
            absmax2=tensors.get("absmax2"),
            absmax_offset=tensors.get("absmax_offset"),
            quant_type=self._quant_type,
            blocksize=self._blocksize,
            dtype=dtype,
        )


class Format8bit(PackedMatrix):
    """int8 with a scale per row, or per ``blocksize`` columns of a row."""

    def _set_format(self, blocksize) -> None:
        self._blocksize = check_blocksize(blocksize, per_row=True)

    blocksize = property(lambda self: self._blocksize, doc="columns per scale; 0 is one scale per row")

    def packed_spec(self):
        n, k = self.weight_shape
        scales = (n, math.ceil(k / self._blocksize)) if self._blocksize else (n,)
        return {"qweight": ((n, k), torch.int8), "absmax": (scales, torch.float32)}

    def format(self):
        return {"blocksize": self._blocksize}

    def _pack(self, dense):
        qweight, absmax = ops.quantize_8bit(dense, self._blocksize)
        check_finite("quantize_8bit", dense, absmax)
        return {"qweight": qweight, "absmax": absmax}

    def _unpack(self, dtype):
        return ops.dequantize_8bit(
            self._parameters["qweight"], self._parameters["absmax"], blocksize=self._blocksize, dtype=dtype
        )
