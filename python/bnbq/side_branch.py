"""Quantised layers with a low-rank float branch beside the packed weight: what a merged adapter may become.

    y = x . (Q + B A)^T + bias    Q packed as ever, A float[r, k] (``side_branch.a``), B float[n, r] (``side_branch.b``)

``weight`` and ``dequantize`` are those of Q + B A, and a new weight W is stored as Q = W - B A packed: for all that
read or write the weight (another adapter's merge, a report) the layer is an ordinary one. `attach` makes a layer one;
state dicts, bnbq.save and save_pretrained hold the branch like any parameters of the model.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn as torch_nn
from torch.nn import functional as F

from .nn import Linear4bit, Linear8bitLt, QuantizedLinear
from .state import describe
from .virtual_weight import VirtualWeight

PARTS = ("side_branch.a", "side_branch.b")
"""The branch's parameters, by their names in the layer's state dict."""


class LowRank(torch_nn.Module):
    """x float[..., k] -> x . A^T . B^T, [..., n], in the branch's dtype. Frozen.

    Not made of nn.Linear, which adapters for all linear layers would look for.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.a = torch_nn.Parameter(a, requires_grad=False)
        self.b = torch_nn.Parameter(b, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)

    def product(self) -> torch.Tensor:
        """B A, float32[n, k]."""
        return self.b.detach().float() @ self.a.detach().float()

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, dtype={str(self.a.dtype).removeprefix('torch.')}"


class SideBranch:
    """Mixed into a quantised layer by `attach`; ``side_branch`` is its LowRank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) + self.side_branch(x)).to(x.dtype)  # rounded once, as an adapter's sum is

    def format(self) -> dict:
        return {**super().format(), "side_rank": self.side_branch.a.shape[0]}

    def assign_weight(self, dense) -> None:
        if isinstance(dense, VirtualWeight) and dense._layer is not self:
            dense = dense._layer.dequantize()  # its packed bytes belong to its own branch
        super().assign_weight(dense)

    def _pack(self, dense):
        return super()._pack(dense.float() - self.side_branch.product().to(dense.device))

    def _unpack(self, dtype):
        return (super()._unpack(torch.float32) + self.side_branch.product()).to(dtype)


class Linear4bitSideBranch(SideBranch, Linear4bit):
    """``Linear4bit`` with a low-rank branch."""


class Linear8bitLtSideBranch(SideBranch, Linear8bitLt):
    """``Linear8bitLt`` with a low-rank branch."""


def attach(layer: QuantizedLinear, a: torch.Tensor, b: torch.Tensor) -> None:
    """Give a layer the branch ``b @ a``, in place: its packed bytes stay and its weight becomes theirs plus b a.

    Args:
        a, b: float[r, in_features] and float[out_features, r] of one dtype. A layer that has a branch gets one of
            both ranks, in the wider dtype.

    Raises ValueError for other shapes or dtypes.
    """
    n, k = layer.out_features, layer.in_features
    fits = a.dim() == b.dim() == 2 and (b.shape[0], a.shape[1]) == (n, k) and a.shape[0] == b.shape[1]
    if not fits or a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(
            f"{layer.describe()}: a side branch of {describe(a)} and {describe(b)}, expected one float dtype and "
            f"shapes [r, {k}] and [{n}, r]"
        )
    if isinstance(layer, SideBranch):
        dtype = torch.promote_types(layer.side_branch.a.dtype, a.dtype)
        a = torch.cat([layer.side_branch.a.to(dtype), a.to(dtype)])
        b = torch.cat([layer.side_branch.b.to(dtype), b.to(dtype)], 1)
    else:
        layer.__class__ = Linear4bitSideBranch if isinstance(layer, Linear4bit) else Linear8bitLtSideBranch
        if "_old_forward" in layer.__dict__:  # what a hook of Accelerate calls: it was bound when the hook came
            layer._old_forward = MethodType(type(layer).forward, layer)
    layer.side_branch = LowRank(a.detach(), b.detach()).train(layer.training)


def attach_empty(layer: QuantizedLinear, rank: int, dtype: torch.dtype) -> None:
    """`attach` a branch without data, on meta, to be loaded."""
    empty = {"dtype": dtype, "device": "meta"}
    attach(layer, torch.empty(rank, layer.in_features, **empty), torch.empty(layer.out_features, rank, **empty))
