"""bitsandbytes.utils: the settings of a quantised weight as a tensor, which is how state dicts hold them."""

from __future__ import annotations

import json

from torch import Tensor

from ..checkpoint_bnb import pack_quant_state
from ._missing import reason_for

__all__ = ["pack_dict_to_tensor", "unpack_tensor_to_dict"]


def pack_dict_to_tensor(source_dict: dict) -> Tensor:
    """Anything that JSON can say -> its UTF-8, u8 [bytes], on the CPU."""
    return pack_quant_state(source_dict)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict:
    """The inverse, unchecked. ValueError for what is no UTF-8 JSON."""
    return json.loads(bytes(tensor_data.tolist()))


__getattr__ = reason_for(
    __name__,
    {
        "bnbq.quantize_model replaces a model's layers": "replace_linear",
        "outliers are found inside the kernel, in each product": "OutlierTracer outlier_hook find_outlier_dims",
    },
)
