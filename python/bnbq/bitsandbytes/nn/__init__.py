"""The layers and weights of bitsandbytes.nn."""

from .._missing import reason_for
from . import modules
from . import parametrize as parametrize
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

__getattr__ = reason_for(__name__, modules.MISSING)
