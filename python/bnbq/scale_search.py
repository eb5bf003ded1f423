"""Quantising a weight that lies near a packed one: scales are searched for instead of taken from the absmax.

A merged adapter moves few elements by as much as a quantisation step, but it moves the largest of most blocks, and with
the absmax the whole grid of a block: packed afresh, such a block is rounded a second time. Here each block gets the
scale with the least squared error out of the one it had, its neighbours and clipped absmaxes. Codes are the nearest
values of the format, as everywhere.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import ops, reference
from .checkpoint_bnb import codebook
from .nn import Linear4bit, QuantizedLinear

NEAR = (1.0, 0.97, 1.03)
"""Candidates, as multiples of the scale that a block had: the first keeps what the adapter did not change."""
CLIPPED = (1.0, 0.94, 0.88)
"""Candidates, as multiples of the new absmax. On fine-tuned SmolLM2-135M layers 80 finer steps gain another 0.5 %."""
SLAB = 1 << 16
"""Elements at once: they stay in the cache over all candidates."""


class Grid:
    """The values that a layer's format has between -1 and 1, and the layout of its blocks."""

    def __init__(self, layer: QuantizedLinear):
        self.n, self.k, self.four = layer.out_features, layer.in_features, isinstance(layer, Linear4bit)
        self.width = layer.blocksize or max(self.k, 1)
        self.tiny = float(reference.TINY_4BIT if self.four else reference.TINY_8BIT)
        if self.four:
            known, device = reference.find_format(layer.quant_type), layer.qweight.device
            self.order = torch.from_numpy(known.order).to(device)
            self.thresholds = torch.from_numpy(known.thresholds).to(device)
            self.ascending = codebook(layer.quant_type).to(device)[self.order.long()]

    def blocks(self, dense: torch.Tensor) -> torch.Tensor:
        """float32[n, k] -> [blocks, width], padded with zeros: 4-bit blocks cross rows, int8 blocks do not."""
        flat = dense.reshape(1, -1) if self.four else dense
        return F.pad(flat, (0, -flat.shape[1] % self.width)).view(-1, self.width)

    def round(self, blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The ranks of the nearest values, int32 or (int8's own integers) float32, for scales [blocks]."""
        x = blocks / scale.clamp_min(self.tiny)[:, None]
        if self.four:
            return torch.bucketize(x, self.thresholds, out_int32=True)
        return (x * 127).round_().clamp_(-127, 127)

    def decode(self, ranks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.four:
            return self.ascending.index_select(0, ranks.view(-1)).view(ranks.shape) * scale[:, None]
        return ranks * scale[:, None] * float(reference.INV127)

    def error(self, blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Squared error of each block, float32[blocks]."""
        return self.decode(self.round(blocks, scale), scale).sub_(blocks).square_().sum(1)

    def best(self, blocks: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The scale of least error of each block, which had the scale ``old``; of equals the first candidate."""
        absmax = blocks.abs().amax(1)
        candidates = [old * factor for factor in NEAR] + [absmax * factor for factor in CLIPPED]
        errors = torch.stack([self.error(blocks, scale) for scale in candidates])
        return torch.stack(candidates).gather(0, errors.argmin(0)[None])[0]

    def pack(self, ranks: torch.Tensor) -> torch.Tensor:
        """qweight for the ranks of all blocks."""
        if not self.four:
            return ranks.view(self.n, -1)[:, : self.k].to(torch.int8).contiguous()
        size = self.n * self.k
        codes = self.order.index_select(0, ranks.view(-1))[: size + size % 2]
        return codes[::2] << 4 | codes[1::2]


def requantize(layer: QuantizedLinear, dense: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``layer`` would store for ``dense``, float32[n, k] on its device, with searched scales: tensors by name.

    ``dense`` is what the packed tensors alone shall stand for. Under double quantisation the codes are chosen for the
    scales as they decode, and the layer's own scales are kept if those that were found do no better once packed.
    Raises ValueError for a NaN or an Inf, as quantising does.
    """
    if not torch.isfinite(dense).all():
        layer.packed(dense)  # raises, naming the first
    grid, had = Grid(layer), layer.packed_tensors()
    qweight, nested = had.pop("qweight"), "absmax2" in had
    old = ops.dequantize_absmax(*had.values()) if nested else had["absmax"]
    blocks, old = grid.blocks(dense), old.reshape(-1)
    slabs = max(SLAB // grid.width, 1)
    found = torch.cat([grid.best(*part) for part in zip(blocks.split(slabs), old.split(slabs), strict=True)])
    scales = {"absmax": found.view(had["absmax"].shape)}
    if nested:
        scales = dict(zip(had, ops.quantize_absmax(scales["absmax"]), strict=True))
        found = ops.dequantize_absmax(*scales.values()).reshape(-1)
        if grid.error(blocks, old).sum() <= grid.error(blocks, found).sum():
            scales, found = {name: tensor.clone() for name, tensor in had.items()}, old
    return {"qweight": grid.pack(grid.round(blocks, found)).view_as(qweight), **scales}
