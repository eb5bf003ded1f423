"""The layers of bitsandbytes.nn: made with a float weight, quantised when they are moved to a device.

Products and bytes are the C core's, so a layer and its `bnbq.nn` counterpart (`bnbq.bitsandbytes.to_bnbq`) give the
same bits. Nothing but the quantising move changes a weight: ``forward`` leaves weight, bias and settings alone, casts
do not touch packed bytes, and copies, pickles and state dicts keep them.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ... import ops
from .._missing import OPTIMIZERS, reason_for
from ..autograd._functions import MatmulLtState, matmul
from ..quant_state import QuantState, core_weight, decoded_absmax, dequantize_state, product_4bit
from .packed import Layer4bit, Layer8bit
from .parameters import Int8Params, Params4bit

logger = logging.getLogger(__name__)


def fix_4bit_weight_quant_state_from_module(module: Layer4bit) -> None:
    """Bring back what a weight lost when FSDP or another made a plain Parameter of it. The layers here need no such
    repair; a ``forward`` that others put in their place does. RuntimeError for a float weight."""
    module.packed_weight()
    module.restore_weight()


def maybe_rearrange_weight(*arguments) -> None:
    """A hook that int8 layers pickled by bitsandbytes name. Loading needs none here."""


class Linear4bit(Layer4bit, nn.Linear):
    """A linear layer with a 4-bit weight.

    ``forward``: x float[..., input_features] -> [..., output_features] in x's dtype; gradients for x and bias.
    RuntimeError before the layer has been moved to a device.

    Args:
        compute_dtype: what x is rounded to; None is x's own dtype, in every call.
        compress_statistics: double quantisation.
        quant_type: "fp4" or "nf4". Blocks have 64 elements.
        quant_storage: dtype under which ``weight`` shows the packed bytes.
    """

    compute_type_is_set = True  # no forward will choose one

    def __init__(self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True,
                 quant_type="fp4", quant_storage=torch.uint8, device=None):
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage

    def forward(self, x: Tensor) -> Tensor:
        weight, state = self.packed_weight()
        return product_4bit(x, weight, state, self.bias, self.compute_dtype)


class LinearFP4(Linear4bit):
    """`Linear4bit` in fp4."""

    def __init__(self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True,
                 quant_storage=torch.uint8, device=None):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` in nf4."""

    def __init__(self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True,
                 quant_storage=torch.uint8, device=None):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class Linear8bitLt(Layer8bit, nn.Linear):
    """A linear layer multiplied as LLM.int8() does.

    ``forward``: x float[..., input_features] -> [..., output_features] in x's dtype.

    Args:
        has_fp16_weights: True keeps a trainable float weight, quantised for each product; False quantises the weight
            once, when the layer is moved to a device.
        threshold: columns of x with an element of at least this magnitude are multiplied in float; 0 for none.
        index: kept, without effect.
    """

    def __init__(self, input_features, output_features, bias=True, has_fp16_weights=True, threshold=0.0, index=None,
                 device=None):
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState(threshold=threshold, has_fp16_weights=has_fp16_weights)
        self.state.use_pool = threshold > 0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def row_scales(self) -> Tensor | None:
        scales = super().row_scales()
        return self.state.SCB if scales is None and self.weight.dtype == torch.int8 else scales

    def init_8bit_state(self) -> None:
        """Show the quantised weight in ``state``, where much code looks for it. The weight keeps it too."""
        self.state.CB, self.state.SCB = self.weight.data, self.row_scales()

    def forward(self, x: Tensor) -> Tensor:
        weight, state = self.weight, self.state
        if weight.dtype != torch.int8:
            # A state for this one product: a weight that is still float may change before the next.
            return matmul(x, weight, bias=self.bias, state=MatmulLtState(threshold=state.threshold))
        scales = self.row_scales()
        if scales is None:
            raise RuntimeError(f"Linear8bitLt{self.weight_shape()}: the weight is int8 without scales (weight.SCB)")
        if state.SCB is not scales:
            self.init_8bit_state()
        return ops.linear8bitlt(x, weight.data, scales, self.bias, threshold=state.threshold).to(x.dtype)


class Embedding4bit(Layer4bit, nn.Embedding):
    """A frozen embedding in 4 bits; only the rows that are looked up are decoded.

    ``forward``: input int[...] -> [..., embedding_dim] in ``dtype`` (default: torch's). Rows must be whole blocks of 64
    for that, otherwise the table is decoded in every call.
    """

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_type="fp4", quant_storage=torch.uint8,
                 device=None):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                "%s: rows of %d elements are not whole blocks of %d; inference is slow, each call decodes the table",
                type(self).__name__,
                embedding_dim,
                self.weight.blocksize,
            )

    def forward(self, input: Tensor) -> Tensor:
        packed, state = self.packed_weight()
        if self.embedding_dim % state.blocksize:
            return embedding(input, dequantize_state(packed, state)).to(self.dtype)
        weight = core_weight(packed, state)
        scales = decoded_absmax(state).view(self.num_embeddings, -1) if state.nested else weight.absmax
        rows = input.reshape(-1)
        found = QuantState(
            embedding(rows, scales).reshape(-1),
            shape=torch.Size((rows.numel(), self.embedding_dim)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        dense = dequantize_state(embedding(rows, weight.qweight), found)
        return dense.view(*input.shape, self.embedding_dim).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` in fp4."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` in nf4."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding8bit(Layer8bit, nn.Embedding):
    """A frozen embedding in int8 with a scale per row; only the rows that are looked up are decoded."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        scales, rows = self.row_scales(), input.reshape(-1)
        if scales is None:
            raise self.not_quantized()
        q, absmax = embedding(rows, self.weight.data), embedding(rows, scales.unsqueeze(1)).view(-1)
        return ops.dequantize_8bit(q, absmax).view(*input.shape, self.embedding_dim).to(self.dtype)


MISSING = {
    f"it is a float embedding with 32-bit optimizer states. {OPTIMIZERS}": "Embedding StableEmbedding",
    "it is an abstract class that bitsandbytes does not implement either": "OutlierAwareLinear",
}
__getattr__ = reason_for(__name__, MISSING)
