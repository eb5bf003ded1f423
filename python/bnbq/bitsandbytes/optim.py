"""Not here: importing it says so."""

from ._missing import OPTIMIZERS

raise ImportError(f"bnbq.bitsandbytes has no optim: {OPTIMIZERS}", name=__name__)
