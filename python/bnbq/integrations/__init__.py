"""Transformers, PEFT and Accelerate, unmodified.

Only the registration lives here, and it imports none of them: ``import bnbq`` calls `install`, which
registers the quantisation method "bnbq" at once if Transformers' quantizers are imported already, and
otherwise when they are. A bnbq checkpoint that Transformers opens without it starts from random weights.
"""

from __future__ import annotations

import sys
import warnings

QUANT_METHOD = "bnbq"
QUANTIZERS = "transformers.quantizers"


def install() -> None:
    """Register with Transformers, now or when it is imported. Calling it again changes nothing."""
    if QUANTIZERS in sys.modules and hasattr(sys.modules[QUANTIZERS], "register_quantizer"):
        register()
    elif not any(isinstance(finder, WaitForQuantizers) for finder in sys.meta_path):
        sys.meta_path.insert(0, WaitForQuantizers())


def register() -> None:
    """Enter BnbqConfig and BnbqQuantizer into Transformers' public tables (``register_quantizer`` and its twin)."""
    from transformers.quantizers import auto

    ours = sys.modules.get(f"{__name__}.transformers")
    if ours is not None and not hasattr(ours, "BnbqQuantizer"):
        return  # it is being imported, which is why Transformers is, and will call this itself
    from .transformers import BnbqConfig, BnbqQuantizer

    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(BnbqConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(BnbqQuantizer)


class WaitForQuantizers:
    """Finds nothing itself: it sees ``transformers.quantizers`` being imported and registers right after."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != QUANTIZERS:
            return None
        spec = None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module):
            loader.__dict__.pop("exec_module", None)  # the instance's: what is left is the class's
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            try:
                register()
            except Exception as error:  # an import of Transformers must not fail for our sake
                text = f"bnbq could not register with Transformers: {type(error).__name__}: {error}"
                warnings.warn(text, stacklevel=2)

        loader.exec_module = exec_module
        return spec
