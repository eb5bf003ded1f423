"""The layers and weights of bitsandbytes.nn."""

from .._missing import OPTIMIZERS, reason_for
from .modules import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
)
from .parameters import Int8Params, Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
]

__getattr__ = reason_for(
    __name__,
    {
        **dict.fromkeys(
            ("Embedding", "StableEmbedding"), f"it is a float embedding with 32-bit optimizer states. {OPTIMIZERS}"
        ),
        "OutlierAwareLinear": "it is an abstract class that bitsandbytes does not implement either",
        "parametrize": "only the weights of linear and embedding layers are quantised here",
    },
)
