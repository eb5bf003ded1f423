"""bitsandbytes' names on bnbq's layers: ``import bnbq.bitsandbytes as bnb`` in place of ``import bitsandbytes as bnb``.

Arguments, defaults and state-dict keys are those of bitsandbytes 0.50.2, so fp4 is the default 4-bit type and
``Linear8bitLt`` trains float weights unless it is told otherwise. The rest of bnbq neither imports nor needs this
package; `to_bnbq` and `from_bnbq` convert models between its layers and `bnbq.nn`'s. There are no optimizers.
"""

from .. import _bnbq
from . import _ops as _ops  # registers torch.ops.bnbq_bitsandbytes
from . import functional, nn, utils
from ._missing import LIBRARY, OPTIMIZERS, reason_for
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .convert import from_bnbq, to_bnbq
from .nn import modules as modules  # bitsandbytes.modules too

__all__ = ["MatmulLtState", "from_bnbq", "functional", "matmul", "matmul_4bit", "nn", "to_bnbq", "utils"]

# What code that looks for abilities asks: the version whose interface this is, and where it runs.
__version__ = "0.50.2"
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"} if _bnbq.build_info()["cuda"] else {"cpu"}

__getattr__ = reason_for(
    __name__,
    {
        OPTIMIZERS: "optim adam",
        LIBRARY: "backends cextension consts cpu_ops cuda_specs default_ops",
        "bitsandbytes' experiments have no counterpart here": "research",
    },
)
