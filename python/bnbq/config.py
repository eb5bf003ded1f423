"""BnbqConfig: the settings of a quantised model, and their JSON.

The constructor takes this library's names (``bits``, ``quant_type``, ``blocksize`` ...) and the
names of transformers' BitsAndBytesConfig (``load_in_4bit``, ``bnb_4bit_quant_type`` ...), so that a
program changes one import. What is stored and written is always this library's. The JSON never
holds a ``load_in_4bit`` or ``load_in_8bit`` key: transformers looks for those before it reads
``quant_method`` and would hand the checkpoint to bitsandbytes.

Defaults differ from bitsandbytes in two places: the 4-bit type is nf4 (bitsandbytes: fp4) and the
compute dtype is the input's (bitsandbytes: float32). ``from_bnb`` keeps bitsandbytes' meaning.
"""

from __future__ import annotations

import difflib
import math

from . import reference

VERSION = 1
"""Version of the JSON and of the tensors it describes."""
QUANT_TYPES = tuple(reference.FORMATS)
BNB_QUANT_TYPES = ("fp4", "nf4")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = (None, "int8")
CHECKPOINT_FORMATS = ("bnbq", "bitsandbytes")

# bitsandbytes' name -> ours, for the arguments that mean the same.
BNB_NAMES = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_8bit_compute_dtype": "compute_dtype",
    "llm_int8_threshold": "threshold",
    "llm_int8_skip_modules": "skip_modules",
}
FOUR_BIT_ONLY = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
EIGHT_BIT_ONLY = ("bnb_8bit_compute_dtype",)
# Accepted because bitsandbytes takes them; bytes are always stored as uint8, and offloaded layers stay quantised.
WITHOUT_EFFECT = ("bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload")
NATIVE = (
    "bits",
    "quant_type",
    "blocksize",
    "double_quant",
    "compute_dtype",
    "activations",
    "threshold",
    "skip_modules",
    "include_modules",
    "quantize_embeddings",
    "checkpoint_format",
    "quant_method",
    "version",
)
ARGUMENTS = (*NATIVE, *BNB_NAMES, *WITHOUT_EFFECT, "load_in_4bit", "load_in_8bit", "llm_int8_has_fp16_weight")


def parse_dtype(value, argument: str):
    """A compute dtype: torch.dtype or its name ("bfloat16", "torch.bfloat16") -> torch.dtype; None stays None.

    Raises TypeError for anything that is not one of float32, bfloat16, float16; ValueError for a name that
    is no dtype at all.
    """
    if value is None or value == "auto":
        return None
    import torch

    dtype = value
    if isinstance(value, str):
        dtype = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"{argument}: {value!r} is not the name of a dtype; use one of {', '.join(COMPUTE_DTYPES)}"
            )
    if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in COMPUTE_DTYPES:
        raise TypeError(
            f"{argument}: got {value!r}, expected None (the input's dtype) or one of {', '.join(COMPUTE_DTYPES)}"
        )
    return dtype


def check_quant_type(value, argument: str = "quant_type") -> str:
    """One of QUANT_TYPES; TypeError for a non-string, ValueError for an unknown name."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: got {value!r}, expected one of {', '.join(QUANT_TYPES)}")
    if value not in QUANT_TYPES:
        raise ValueError(f"{argument}: unknown 4-bit format {value!r}; known: {', '.join(QUANT_TYPES)}")
    return value


def check_blocksize(value, argument: str = "blocksize", *, per_row: bool = False) -> int:
    """One of reference.BLOCKSIZES, or 0 (one scale per row) with ``per_row``; otherwise ValueError or TypeError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: got {value!r}, expected an int")
    if value not in reference.BLOCKSIZES and not (per_row and value == 0):
        known = ", ".join(map(str, ((0,) if per_row else ()) + reference.BLOCKSIZES))
        raise ValueError(f"{argument}: got {value}, expected one of {known}")
    return value


def check_activations(value, argument: str = "activations") -> str | None:
    """One of ACTIVATIONS; TypeError for another kind, ValueError for another name."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{argument}: got {value!r}, expected None or 'int8'")
    if value not in ACTIVATIONS:
        raise ValueError(f"{argument}: got {value!r}, expected None or 'int8'")
    return value


def check_bool(value, argument: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: got {value!r}, expected True or False")
    return value


def check_threshold(value, argument: str = "threshold") -> float:
    """A finite number >= 0; TypeError for another kind, ValueError for another value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: got {value!r}, expected a number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{argument}: got {value}, expected a finite number >= 0 (0 means no outliers)")
    return float(value)


def check_names(value, argument: str) -> list[str] | None:
    """None or a list of module names; a bare string is refused (it would be taken for a list of letters)."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{argument}: got {value!r}, expected a list of module names such as ['lm_head']")
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument}: got {name!r} in the list, expected module names")
    return names


class BnbqConfig:
    """Settings of a quantised model: what ``quantize_model`` and ``from_pretrained`` take.

    Fields after construction (arguments of the same names set them):

    * ``bits``: 4 (default) or 8. ``load_in_4bit=True`` and ``load_in_8bit=True`` say the same.
    * ``quant_type``: "nf4" (default), "fp4" or "int4" with 4 bits; "int8" with 8.
    * ``blocksize``: 64 by default with 4 bits; with 8 bits 0, one scale per output row, by default.
    * ``double_quant``: the scales of a 4-bit layer are quantised too (0.4 bits per weight less). False by default.
    * ``compute_dtype``: torch.dtype or None, the input's dtype (default).
    * ``activations``: None (default), or "int8" for 4-bit layers that round their inputs to int8: less exact,
      and with AVX-512 VNNI faster (see ``bnbq.nn.Linear4bit``).
    * ``threshold``: activations this large are multiplied in float by 8-bit layers; 6.0 by default, 0 for none.
    * ``skip_modules``: names of modules to leave alone, in addition to the default rules (see ``bnbq.replace``).
    * ``include_modules``: names of modules to quantise although a default rule would leave them alone.
    * ``quantize_embeddings``: token embeddings are quantised like linear layers, and an output head that is tied to
      one shares its bytes. False by default.
    * ``checkpoint_format``: "bnbq" (default) or "bitsandbytes", the layout that saving writes.
    * ``quant_method`` "bnbq" and ``version`` 1 identify the JSON.

    BitsAndBytesConfig's arguments are understood as well; ``bnb_4bit_quant_storage`` and
    ``llm_int8_enable_fp32_cpu_offload`` have no effect, ``llm_int8_has_fp16_weight=True`` is an error.
    All arguments are by keyword. Raises TypeError for unknown arguments and wrong kinds, ValueError for
    wrong values and for arguments that contradict each other.
    """

    def __init__(
        self,
        *,
        bits=None,
        quant_type=None,
        blocksize=None,
        double_quant=None,
        compute_dtype=None,
        activations=None,
        threshold=None,
        skip_modules=None,
        include_modules=None,
        quantize_embeddings=None,
        checkpoint_format=None,
        quant_method=None,
        version=None,
        load_in_4bit=None,
        load_in_8bit=None,
        bnb_4bit_quant_type=None,
        bnb_4bit_use_double_quant=None,
        bnb_4bit_compute_dtype=None,
        bnb_8bit_compute_dtype=None,
        llm_int8_threshold=None,
        llm_int8_skip_modules=None,
        bnb_4bit_quant_storage=None,
        llm_int8_enable_fp32_cpu_offload=None,
        llm_int8_has_fp16_weight=None,
        **unknown,
    ):
        given = {name: value for name, value in locals().items() if value is not None}
        del given["self"], given["unknown"]
        for name in unknown:
            close = difflib.get_close_matches(name, ARGUMENTS, 1)
            raise TypeError(
                f"BnbqConfig: unknown argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        self.quant_method = given.pop("quant_method", "bnbq")
        if self.quant_method != "bnbq":
            raise ValueError(
                f"quant_method: got {self.quant_method!r}, expected 'bnbq' "
                "(BnbqConfig.from_bnb reads bitsandbytes' settings)"
            )
        self.version = given.pop("version", VERSION)
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise ValueError(f"version: got {self.version!r}, expected an integer from 1 to {VERSION}")
        if self.version > VERSION:
            raise ValueError(
                f"version: these settings have version {self.version}, this bnbq knows {VERSION}: upgrade bnbq"
            )
        if check_bool(given.pop("llm_int8_has_fp16_weight", False), "llm_int8_has_fp16_weight"):
            raise ValueError(
                "llm_int8_has_fp16_weight=True: bnbq keeps no 16-bit copy of the weights; leave it out, "
                "and train adapters on the quantised layers"
            )
        check_bool(given.pop("llm_int8_enable_fp32_cpu_offload", False), "llm_int8_enable_fp32_cpu_offload")
        self._check_storage(given.pop("bnb_4bit_quant_storage", None))
        self.bits = self._read_bits(given)
        given = self._translate(given)

        if self.bits == 4:
            self.quant_type = check_quant_type(given.get("quant_type", "nf4"))
            self.blocksize = check_blocksize(given.get("blocksize", 64))
        else:
            self.quant_type = given.get("quant_type", "int8")
            if self.quant_type != "int8":
                raise ValueError(f"quant_type: got {self.quant_type!r} with 8 bits, expected 'int8' or nothing")
            self.blocksize = check_blocksize(given.get("blocksize", 0), per_row=True)
        self.double_quant = check_bool(given.get("double_quant", False), "double_quant")
        if self.double_quant and self.bits == 8:
            raise ValueError("double_quant=True: 8-bit layers have one scale per row, which is not quantised again")
        self.compute_dtype = parse_dtype(given.get("compute_dtype"), "compute_dtype")
        self.activations = check_activations(given.get("activations"))
        if self.activations and self.bits == 8:
            raise ValueError(f"activations={self.activations!r} is for 4-bit layers: 8-bit layers always round theirs")
        self.threshold = check_threshold(given.get("threshold", 6.0))
        self.skip_modules = check_names(given.get("skip_modules"), "skip_modules")
        self.include_modules = check_names(given.get("include_modules"), "include_modules")
        self.quantize_embeddings = check_bool(given.get("quantize_embeddings", False), "quantize_embeddings")
        self.checkpoint_format = given.get("checkpoint_format", "bnbq")
        self._check_checkpoint_format()

    @staticmethod
    def _check_storage(value) -> None:
        """bnb_4bit_quant_storage chooses a container dtype for the same bytes; here it is always uint8."""
        names = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")
        if value is not None and str(value).removeprefix("torch.") not in names:
            raise ValueError(
                f"bnb_4bit_quant_storage: got {value!r}, expected one of {', '.join(names)} (bnbq stores uint8)"
            )

    @staticmethod
    def _read_bits(given) -> int:
        four = given.pop("load_in_4bit", None)
        eight = given.pop("load_in_8bit", None)
        for name, value in (("load_in_4bit", four), ("load_in_8bit", eight)):
            if value is not None:
                check_bool(value, name)
        if four and eight:
            raise ValueError("load_in_4bit and load_in_8bit are both True; choose one")
        asked = 4 if four else 8 if eight else None
        bits = given.pop("bits", asked)
        if bits is None:
            if four is False:
                raise ValueError("load_in_4bit=False without load_in_8bit=True: nothing would be quantised")
            bits = 4
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"bits: got {bits!r}, expected 4 or 8")
        if bits not in (4, 8):
            raise ValueError(f"bits: got {bits}, expected 4 or 8")
        if asked not in (None, bits):
            raise ValueError(f"bits={bits} and load_in_{asked}bit=True contradict each other")
        return bits

    def _translate(self, given) -> dict:
        """bitsandbytes' names to ours. Arguments for the other number of bits have no effect, as in bitsandbytes."""
        ours = {name: value for name, value in given.items() if name not in BNB_NAMES}
        for name in (n for n in BNB_NAMES if n in given):
            value, target = given[name], BNB_NAMES[name]
            # The kind is checked even where the value has no effect.
            if target == "compute_dtype":
                value = parse_dtype(value, name)
            elif name == "bnb_4bit_quant_type":
                check_quant_type(value, name)
            elif name == "bnb_4bit_use_double_quant":
                check_bool(value, name)
            elif name == "llm_int8_threshold":
                value = check_threshold(value, name)
            elif name == "llm_int8_skip_modules":
                value = check_names(value, name)
            if name in (FOUR_BIT_ONLY if self.bits == 8 else EIGHT_BIT_ONLY):
                continue
            if target in ours:
                other = parse_dtype(ours[target], target) if target == "compute_dtype" else ours[target]
                if other != value:
                    raise ValueError(f"{target}={ours[target]!r} and {name}={given[name]!r} contradict each other")
            ours[target] = value
        return ours

    def _check_checkpoint_format(self) -> None:
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise ValueError(
                f"checkpoint_format: got {self.checkpoint_format!r}, expected one of {', '.join(CHECKPOINT_FORMATS)}"
            )
        if self.checkpoint_format == "bitsandbytes":
            if self.quantize_embeddings:
                raise ValueError(
                    "checkpoint_format='bitsandbytes': bitsandbytes has no format for embeddings; "
                    "leave quantize_embeddings out"
                )
            if self.bits == 4 and self.quant_type not in BNB_QUANT_TYPES:
                raise ValueError(
                    f"checkpoint_format='bitsandbytes': bitsandbytes has no {self.quant_type}, "
                    f"only {' and '.join(BNB_QUANT_TYPES)}"
                )
            if self.bits == 8 and self.blocksize:
                raise ValueError(
                    "checkpoint_format='bitsandbytes': bitsandbytes' int8 has one scale per row, "
                    f"blocksize is {self.blocksize}"
                )

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict:
        """JSON-safe dict: what config.json holds. bitsandbytes' own layout if ``checkpoint_format`` says so."""
        return self.to_bnb_dict() if self.checkpoint_format == "bitsandbytes" else self.to_native_dict()

    def to_native_dict(self) -> dict:
        """This library's JSON, whatever ``checkpoint_format`` is; no key starts with load_in_."""
        result = {
            "quant_method": "bnbq",
            "version": self.version,
            "bits": self.bits,
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "compute_dtype": None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch."),
            "threshold": self.threshold,
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "checkpoint_format": self.checkpoint_format,
        }
        if self.include_modules is not None:
            result["include_modules"] = list(self.include_modules)
        if self.activations is not None:
            result["activations"] = self.activations
        if self.quantize_embeddings:
            result["quantize_embeddings"] = True
        return result

    def to_bnb_dict(self) -> dict:
        """The JSON that bitsandbytes' integration in transformers writes and reads.

        It has no key for ``activations``, nor for the block size, which bitsandbytes stores with each tensor. A
        compute dtype of None (the input's) is written as null, which bitsandbytes reads as its default, float32.
        """
        four = self.bits == 4
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": self.quant_type if four else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": self.threshold,
            "llm_int8_skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs: bool = False, **kwargs):
        """The inverse of ``to_dict``; takes either JSON. ``kwargs`` that name a field override it."""
        values = dict(config_dict)
        if values.get("quant_method") == "bitsandbytes":
            config = cls.from_bnb(values, checkpoint_format="bitsandbytes")
        else:
            version = values.get("version", VERSION)
            if (
                isinstance(version, int) and version > VERSION
            ):  # before an unknown key of the future is complained about
                raise ValueError(
                    f"version: these settings have version {version}, this bnbq knows {VERSION}: upgrade bnbq"
                )
            config = cls(**values)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in NATIVE}
        if overrides:
            config = cls(**{**config.to_native_dict(), **overrides})
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_bnb(cls, config, **overrides):
        """From a transformers.BitsAndBytesConfig or the JSON (dict) that it writes.

        Keys that an old file lacks have bitsandbytes' defaults (fp4, no double quantisation, threshold 6.0).
        A missing compute dtype means the input's, as in bitsandbytes' own layers. ``overrides`` are arguments
        of this class. The block size of a stored checkpoint is with its tensors; here it is 64.
        Raises TypeError for another kind of object and ValueError for settings that quantise nothing.
        """
        if isinstance(config, BnbqConfig):
            raise TypeError("from_bnb: got a BnbqConfig, expected a transformers.BitsAndBytesConfig or its JSON")
        values = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
        if not any(name in values for name in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
            raise TypeError(f"from_bnb: got {config!r}, expected a transformers.BitsAndBytesConfig or its JSON")
        four = bool(values.get("load_in_4bit", values.get("_load_in_4bit", False)))
        eight = bool(values.get("load_in_8bit", values.get("_load_in_8bit", False)))
        if not four and not eight:
            raise ValueError("from_bnb: load_in_4bit and load_in_8bit are both False: nothing would be quantised")
        arguments = {"load_in_4bit": four, "load_in_8bit": eight, "bnb_4bit_quant_type": "fp4"}
        for name in (*BNB_NAMES, *WITHOUT_EFFECT, "llm_int8_has_fp16_weight"):
            if values.get(name) is not None:
                arguments[name] = values[name]
        for ours in overrides:
            for name in [n for n, target in BNB_NAMES.items() if target == ours]:
                arguments.pop(name, None)
        return cls(**{**arguments, **overrides})

    # ------------------------------------------------------------------ use

    def layer_settings(self) -> dict:
        """Keyword arguments of the layer class for these settings (``bnbq.nn.Linear4bit`` or ``Linear8bitLt``)."""
        run_time = {"activations": self.activations} if self.bits == 4 else {"threshold": self.threshold}
        return {**self.embedding_settings(), "compute_dtype": self.compute_dtype, **run_time}

    def embedding_settings(self) -> dict:
        """Keyword arguments of the embedding class (``bnbq.nn.Embedding4bit`` or ``Embedding8bit``): the format."""
        if self.bits == 8:
            return {"blocksize": self.blocksize}
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}

    def describe(self) -> str:
        """The format in a few words: "nf4, blocks of 64, double quantised"."""
        if self.bits == 8:
            return "int8, one scale per row" if self.blocksize == 0 else f"int8, blocks of {self.blocksize}"
        return f"{self.quant_type}, blocks of {self.blocksize}" + (", double quantised" if self.double_quant else "")

    def __eq__(self, other) -> bool:
        if not isinstance(other, BnbqConfig):
            return NotImplemented
        return self.to_native_dict() == other.to_native_dict()

    __hash__ = None

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={value!r}" for name, value in self.to_native_dict().items() if name != "quant_method"
        )
        return f"BnbqConfig({fields})"
