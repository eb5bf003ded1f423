"""4-bit and 8-bit linear layers for PyTorch on a plain C core.

Importing this package loads neither torch nor the C extension: every public name is looked up on
first use. It only leaves word for transformers, so that a checkpoint with ``quant_method: "bnbq"``
finds its quantiser whichever of the two is imported first.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_HOME = {
    "nn": "bnbq.nn",
    "ops": "bnbq.ops",
    "BnbqConfig": "bnbq.config",
    "quantize_model": "bnbq.replace",
    "set_activations": "bnbq.nn",
    "set_compute_dtype": "bnbq.nn",
    "set_batch_invariant": "bnbq.ops",
    "plan": "bnbq.planning",
    "report": "bnbq.report",
    "explain": "bnbq.report",
    "get_memory_footprint": "bnbq.report",
    "count_parameters": "bnbq.report",
    "print_trainable_parameters": "bnbq.report",
    "from_pretrained": "bnbq.integrations.transformers",
    "prepare_model_for_kbit_training": "bnbq.integrations.peft",
    "init_loftq": "bnbq.loftq",
    "merge": "bnbq.merging",
    "MergeRefused": "bnbq.merging",
    "get_peft_model": "bnbq.integrations.peft",
    "lora_config": "bnbq.integrations.experts",
    "load_and_quantize": "bnbq.integrations.accelerate",
    "protect_scales": "bnbq.packed",
    "save": "bnbq.checkpoint",
    "load": "bnbq.checkpoint",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'bnbq' has no attribute {name!r}")
    if name == "BnbqConfig":
        # The class that transformers accepts, where there is one; isinstance of config.BnbqConfig either way.
        from importlib.util import find_spec

        if find_spec("transformers") is not None:
            home = "bnbq.integrations.transformers"
    if home.startswith("bnbq.integrations."):
        import_module("transformers.quantizers")  # registers, and so imports ours at the right moment
    module = import_module(home)
    value = module if home == f"bnbq.{name}" and name != "report" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """``bnbq.report`` is the function, also after its module of the same name has been imported."""

    def __setattr__(self, name, value):
        if name == "report" and isinstance(value, ModuleType):
            value = value.report
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

import_module("bnbq.integrations").install()
