"""`bnbq.from_pretrained`: which settings a call means, and how a checkpoint that bitsandbytes saved comes to us.

A bitsandbytes checkpoint is claimed by rewriting the settings in a copy of its config, which is then passed along;
the files and Transformers' tables stay as they are.
"""

from __future__ import annotations

import copy

from .. import config as settings
from .transformers import BnbqConfig


def load(model_class, name_or_path, args: tuple, quantization_config, kwargs: dict):
    """The work of `transformers.from_pretrained`, which has the documentation."""
    given = {
        key: kwargs.pop(key) for key in settings.ARGUMENTS if key in kwargs and key not in ("version", "quant_method")
    }
    given = {key: value for key, value in given.items() if value is not None}
    wanted = resolve_settings(quantization_config, given)
    try:
        config, rest = model_config(model_class, name_or_path, kwargs)
        owner = stored_settings_owner(config)
    except (OSError, ValueError):  # no config of a model, as in an adapter's directory: Transformers knows what to do
        owner = None
    if owner is None:
        if wanted is not None:
            kwargs["quantization_config"] = wanted
        return model_class.from_pretrained(name_or_path, *args, **kwargs)
    stored = owner.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method", "bitsandbytes") not in ("bnbq", "bitsandbytes"):
        if wanted is not None:
            raise ValueError(
                f"{name_or_path} is quantised with {stored['quant_method']}; it cannot be quantised again with bnbq"
            )
        return model_class.from_pretrained(name_or_path, *args, **kwargs)
    merged = merge_settings(stored, wanted, given, quantization_config is not None, name_or_path)
    owner.quantization_config = merged.to_native_dict()
    return model_class.from_pretrained(name_or_path, *args, config=config, **rest)


def resolve_settings(quantization_config, given: dict):
    """The settings asked for, as a BnbqConfig; None if there are none."""
    if quantization_config is None:
        asked = [given[key] for key in ("bits", "load_in_4bit", "load_in_8bit") if key in given]
        return BnbqConfig(**given) if given and (any(asked) or not asked) else None
    if isinstance(quantization_config, dict):
        if quantization_config.get("quant_method") == "bnbq":
            return BnbqConfig.from_dict({**quantization_config, **given})
        return BnbqConfig.from_bnb(quantization_config, **given)
    if isinstance(quantization_config, settings.BnbqConfig):
        return BnbqConfig(**{**quantization_config.to_native_dict(), **given})
    return BnbqConfig.from_bnb(quantization_config, **given)


def model_config(model_class, name_or_path, kwargs: dict):
    """The model's config, and the keyword arguments that are left once it has taken its own."""
    from transformers import AutoConfig, PreTrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), {key: value for key, value in kwargs.items() if key != "config"}
    # As Transformers' auto classes do: a dtype is the model's, not the config's.
    held = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    passed = {key: value for key, value in kwargs.items() if key not in held and key != "config"}
    reader = getattr(model_class, "config_class", None) or AutoConfig
    config, rest = reader.from_pretrained(config or name_or_path, return_unused_kwargs=True, **passed)
    hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
    return config, {**rest, **held, **{key: kwargs[key] for key in hub if key in kwargs}}


def stored_settings_owner(config):
    """The config (of the model or of its text part) that says how the checkpoint is quantised, or None."""
    for owner in (config, config.get_text_config(decoder=True)):
        if getattr(owner, "quantization_config", None) is not None:
            return owner
    return None


def merge_settings(stored: dict, wanted, given: dict, whole: bool, where):
    """A checkpoint's own settings, with the run-time ones replaced by what was asked for."""
    config = (
        BnbqConfig.from_dict(stored)
        if stored.get("quant_method") == "bnbq"
        else BnbqConfig.from_bnb(stored, checkpoint_format="bitsandbytes")
    )
    if wanted is None:
        return config
    if wanted.bits != config.bits and (whole or {"bits", "load_in_4bit", "load_in_8bit"} & set(given)):
        raise ValueError(
            f"{where} is quantised to {config.bits} bits; it cannot be loaded with {wanted.bits}. "
            "Quantise the original model"
        )
    merged = config.to_native_dict()
    if wanted.compute_dtype is not None:
        merged["compute_dtype"] = wanted.compute_dtype
    if wanted.activations is not None:
        merged["activations"] = wanted.activations
    for key in {"threshold", "checkpoint_format"} & {settings.BNB_NAMES.get(name, name) for name in given}:
        merged[key] = getattr(wanted, key)
    return BnbqConfig(**merged)
