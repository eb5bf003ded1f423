"""Quantised embeddings for PyTorch: ``Embedding4bit`` and ``Embedding8bit``.

Each is a subclass of ``nn.Embedding`` that stores its table [n, k] as a linear layer of the same format stores its
weight (nn.py), with n = num_embeddings and k = embedding_dim, so that an output head can be tied to it: the two then
hold the same Parameters. One Parameter is added::

    like    f[1], zero: its dtype is that of the rows, and any cast of the module casts it

It is there because transformers takes a model's dtype from its first float Parameter, which else would be ``absmax``.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from . import ops
from ._bnbq import ABSMAX_BLOCK
from .matrix import Format4bit, Format8bit, PackedMatrix
from .packed import WEIGHT_DTYPES, PackedModule
from .state import LIKE


class QuantizedEmbedding(PackedMatrix, nn.Embedding):
    """What the quantised embeddings share. Subclasses give the format and how to decode some rows."""

    float_class = nn.Embedding
    """The class of the float module that it stands for."""
    _compute_dtype = None  # nothing is computed: a row is decoded and rounded once

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the rows that ``forward`` returns, and that ``weight`` reports."""
        return self._parameters[LIKE].dtype

    @weight_dtype.setter
    def weight_dtype(self, dtype: torch.dtype) -> None:
        self._parameters[LIKE] = nn.Parameter(self._parameters[LIKE].detach().to(dtype), requires_grad=False)

    # ------------------------------------------------------------------ construction

    def _build(self, num_embeddings, embedding_dim, padding_idx, weight_dtype, device) -> None:
        """The tensors of a new module: nn.Embedding's own random initialisation, quantised; unfilled on meta."""
        self._check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"{type(self).__name__}: padding_idx is {padding_idx}, expected an id of one of "
                f"{num_embeddings} embeddings"
            )
        dtype = self._float_dtype(weight_dtype)
        dense = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._take_over(dense, dense.weight, dtype)

    def _take_over(self, module: nn.Embedding, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Become ``module`` (its settings, hooks, buffers and further Parameters), with ``weight`` packed."""
        own = {name: value for name, value in self.__dict__.items() if name not in module.__dict__}
        self.__dict__.update(state_of(module), **own)
        others = self._parameters
        del others["weight"]
        self._parameters = {}
        dtype = dtype if dtype in WEIGHT_DTYPES else torch.float32
        self.register_parameter(LIKE, nn.Parameter(weight.new_zeros(1, dtype=dtype), requires_grad=False))
        self._register_packed(self.packed(weight))
        self._parameters.update(others)

    @classmethod
    def from_embedding(cls, module: nn.Embedding, device=None, **settings):
        """Quantise a float embedding.

        Args:
            module: nn.Embedding or a subclass, whose forward is kept: the rows that it scales or shifts are decoded
                ones. Left as it is.
            device: "meta" makes an unfilled module; None quantises where the weight lies.
            settings: keyword arguments of the class (``quant_type``, ``blocksize`` ...); without ``weight_dtype`` the
                dtype is the module's.

        Raises TypeError for other modules, ValueError for a NaN or an Inf in the weight, naming its index, and for
        ``max_norm``, with which a lookup would write to the weight.
        """
        if not isinstance(module, nn.Embedding) or isinstance(module, PackedModule):
            raise TypeError(f"from_embedding: got {type(module).__name__}, expected nn.Embedding")
        if module.max_norm is not None:
            raise ValueError(f"from_embedding: max_norm is {module.max_norm}, expected None: a lookup would write")
        weight = module.weight.detach()
        dtype = settings.pop("weight_dtype", None) or weight.dtype
        kind = cls if type(module) is nn.Embedding else with_forward_of(type(module), cls)
        new = kind.__new__(kind)
        new.__dict__.update(cls(*weight.shape, device="meta", **settings).__dict__)
        new._take_over(module, weight if device is None else weight.to(device), dtype)
        return new

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The float module that this one stands for, in ``dtype`` (None: ``weight_dtype``)."""
        new = self.float_class.__new__(self.float_class)
        new.__dict__.update(state_of(self))
        weight = nn.Parameter(self.dequantize(dtype))
        others = {name: value for name, value in self._parameters.items() if name not in (LIKE, *self.packed_spec())}
        new._parameters = {"weight": weight, **others}
        return new

    def reset_parameters(self) -> None:
        """nn.Embedding's random initialisation, quantised."""
        qweight = self._parameters["qweight"]
        if not qweight.is_meta:
            fresh = nn.Embedding(*self.weight_shape, self.padding_idx, device=qweight.device, dtype=self.weight_dtype)
            self.quantize_(fresh.weight.detach())

    # ------------------------------------------------------------------ use

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{self.describe()}: ids are {input.dtype}, expected torch.int64 or torch.int32")
        ids = input.reshape(-1).long()
        self._check_range(ids)
        return self._rows(ids).view(*input.shape, self.embedding_dim)

    def _check_range(self, ids: torch.Tensor) -> None:
        """IndexError for an id that is not in the table. In a compiled or GPU program the gather checks."""
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
            return
        least, most = (int(bound) for bound in ids.aminmax())
        if least < 0 or most >= self.num_embeddings:
            raise IndexError(
                f"{self.describe()}: id {least if least < 0 else most} is out of range, "
                f"expected 0 to {self.num_embeddings - 1}"
            )

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Those rows of the table, [ids, k]."""
        raise NotImplementedError

    def _check_dense(self, dense) -> None:
        n, k = self.weight_shape
        if isinstance(dense, torch.Tensor) and dense.shape[1:] == (k,) and len(dense) != n:
            raise ValueError(
                f"{self.describe()}: the new weight has {len(dense)} rows, expected {n}; "
                "resize the embeddings of the float model, before it is quantised"
            )
        super()._check_dense(dense)

    def describe(self) -> str:
        """For messages: "Embedding4bit(32000, 4096, nf4)"."""
        n, k = self.weight_shape
        return f"{type(self).__name__}({n}, {k}, {self.format().get('quant_type', 'int8')})"

    def extra_repr(self) -> str:
        settings = {"padding_idx": self.padding_idx} if self.padding_idx is not None else {}
        settings |= self.format()
        sizes = ", ".join(map(str, self.weight_shape))
        return ", ".join([sizes, *(f"{name}={value}" for name, value in settings.items())])


class Embedding4bit(Format4bit, QuantizedEmbedding):
    """An embedding whose table is stored with 4 bits per element and a scale per block.

    ``forward``: ids int64 or int32 [...] -> [..., embedding_dim] in ``weight_dtype``. Only the rows asked for are
    decoded. IndexError for an id out of range.

    Args:
        padding_idx: kept for those who ask; its row is zero at the start.
        quant_type, blocksize, double_quant: as in ``Linear4bit``.
        weight_dtype: of the rows; None is torch's default dtype.
        device: "meta" makes an unfilled module.

    ``from_embedding`` quantises an embedding there is. Raises TypeError and ValueError for bad settings.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        weight_dtype: torch.dtype | None = None,
        device=None,
    ):
        nn.Module.__init__(self)
        self._set_format(quant_type, blocksize, double_quant)
        self._build(num_embeddings, embedding_dim, padding_idx, weight_dtype, device)

    def _rows(self, ids):
        tensors, (_, k), blocksize = self._parameters, self.weight_shape, self._blocksize
        if k % blocksize == 0:
            qweight = tensors["qweight"].index_select(0, ids)
            absmax = (
                self._scales(ids * (k // blocksize), k // blocksize)
                if self._double_quant
                else tensors["absmax"].index_select(0, ids)
            )
            return self._decode(qweight, absmax)
        # Blocks cross rows: decode all that a row touches, and take the row out of them.
        blocks, inside = pieces(ids * k, k, blocksize)
        qweight = gather(tensors["qweight"], blocks, blocksize // 2)
        absmax = (
            self._scales(blocks[:, 0], blocks.shape[1]) if self._double_quant else gather(tensors["absmax"], blocks, 1)
        )
        return self._decode(qweight, absmax).gather(1, inside)

    def _scales(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` scales from each of ``first`` on, out of double-quantised ones."""
        tensors = self._parameters
        blocks, inside = pieces(first, count, ABSMAX_BLOCK)
        codes, absmax2 = gather(tensors["absmax"], blocks, ABSMAX_BLOCK), gather(tensors["absmax2"], blocks, 1)
        return ops.dequantize_absmax(codes, absmax2.flatten(), tensors["absmax_offset"]).gather(1, inside)

    def _decode(self, qweight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        shape = qweight.shape[0], 2 * qweight.shape[1]
        return ops.dequantize_4bit(
            qweight,
            absmax,
            shape,
            quant_type=self._quant_type,
            blocksize=self._blocksize,
            dtype=self.weight_dtype,
        )


class Embedding8bit(Format8bit, QuantizedEmbedding):
    """An embedding whose table is stored as int8 with a scale per row, or per ``blocksize`` columns of a row.

    Otherwise as ``Embedding4bit``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        blocksize: int = 0,
        weight_dtype: torch.dtype | None = None,
        device=None,
    ):
        nn.Module.__init__(self)
        self._set_format(blocksize)
        self._build(num_embeddings, embedding_dim, padding_idx, weight_dtype, device)

    def _rows(self, ids):
        qweight, absmax = (self._parameters[name].index_select(0, ids) for name in ("qweight", "absmax"))
        return ops.dequantize_8bit(qweight, absmax, blocksize=self._blocksize, dtype=self.weight_dtype)


# ------------------------------------------------------------------ gathering


def pieces(first: torch.Tensor, length: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``length`` items from each of ``first`` on lie in a sequence that is cut in pieces of ``step`` items.

    Returns the numbers of the pieces, i64[m, most pieces that can be touched], and the places of the items in what
    `gather` makes of these pieces, i64[m, length].
    """
    start = (first // step)[:, None]
    touched = (length + step - 2) // step + 1
    numbers = start + torch.arange(touched, device=first.device)
    return numbers, first[:, None] - start * step + torch.arange(length, device=first.device)


def gather(flat: torch.Tensor, numbers: torch.Tensor, step: int) -> torch.Tensor:
    """Those pieces of ``step`` items, [m, pieces * step]; what is past the end is filled with the last item."""
    flat = flat.flatten()
    index = numbers[:, :, None] * step + torch.arange(step, device=flat.device)
    return flat[index.clamp(max=flat.numel() - 1)].flatten(1)


# ------------------------------------------------------------------ classes


def state_of(module: nn.Module) -> dict:
    """What a module of another class needs to be like ``module``: its attributes, and dicts of tensors of its own."""
    own = ("_parameters", "_buffers", "_modules")
    return {name: value.copy() if name in own else value for name, value in module.__dict__.items()}


@functools.cache
def with_forward_of(kind: type, base: type) -> type:
    """``base`` with what ``kind``, a subclass of nn.Embedding, does beside looking up. Its ``super()`` and its
    ``self.weight`` are those of ``base``."""
    name = f"{kind.__name__}{base.__name__.removeprefix('Embedding')}"
    body = {"float_class": kind, "__reduce_ex__": lambda self, protocol: (new_of, (kind, base), self.__dict__)}
    return type(name, (kind, base), body)


def new_of(kind: type, base: type):
    """An empty module of ``with_forward_of``'s class: no module of Python's has it, so pickle calls this."""
    cls = with_forward_of(kind, base)
    return cls.__new__(cls)
