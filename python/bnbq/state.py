"""What a quantised layer accepts from a state dict, checked before anything is changed.

Three kinds of entries fill a layer: its own (``qweight``, ``absmax``, and with double quantisation
``absmax2``, ``absmax_offset``), a dense ``weight`` (quantised on the way in), and bitsandbytes' (``weight``
with ``weight.absmax`` ..., or with ``SCB``). ``state_dict()._metadata``, which ``torch.save`` keeps, says in
what format the bytes are; where it is there it must agree with the layer, since nf4 and fp4 bytes look alike.
"""

from __future__ import annotations

import torch

VERSION = 1
METADATA_KEY = "bnbq"
BITS = torch.int32
"""Of scales that are held as the bits of a float32 (packed.protect_scales)."""
LIKE = "like"
"""Parameter of an embedding that only has a dtype (embedding.py): a state dict may lack it."""


def describe(tensor) -> str:
    """For messages: "uint8 [64, 32]"."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def format_metadata(layer) -> dict:
    """The entry that a layer puts into ``state_dict()._metadata``: plain numbers and strings."""
    return {"version": VERSION, **layer.format()}


def checked_entries(layer, state_dict, prefix: str, metadata: dict, missing: list, unexpected: list, errors: list):
    """The entries of ``state_dict`` for ``layer``, as nn.Module's own loading takes them.

    Full names -> tensors of exactly the dtype and shape of the layer's Parameters, or {} if something is wrong: the
    message is then in ``errors`` and nothing may be changed. Fills ``missing`` and ``unexpected`` with full names.
    """
    name = prefix[:-1] or type(layer).__name__
    entries = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    try:
        packed, used, absent = read_state(layer, entries, metadata.get(METADATA_KEY), name)
        plain = float_entries(layer, entries, name)
        absent = [*(key for key in plain if key not in entries and key != LIKE), *absent]
        plain = {key: entries[key] for key in plain if key in entries}
    except (ValueError, TypeError) as error:
        errors.append(str(error))
        return {}
    missing += [prefix + key for key in absent]
    used = used | plain.keys()
    unexpected += [prefix + key for key in entries if key not in used and key.partition(".")[0] not in layer._modules]
    return {prefix + key: value for key, value in {**packed, **plain}.items()}


def float_entries(layer, entries: dict, name: str) -> dict:
    """What a layer keeps beside its packed tensors (a bias, a buffer): its tensors by name. ValueError if what the
    state dict has for one of them is of another shape."""
    spec, hidden = layer.packed_spec(), layer._non_persistent_buffers_set
    wanted = {key: own for key, own in layer._parameters.items() if own is not None and key not in spec}
    wanted |= {key: own for key, own in layer._buffers.items() if own is not None and key not in hidden}
    for key, own in wanted.items():
        if key in entries and (not isinstance(entries[key], torch.Tensor) or entries[key].shape != own.shape):
            raise ValueError(f"{name}.{key}: got {describe(entries[key])}, wanted shape {list(own.shape)}")
    return wanted


def read_state(layer, tensors: dict, metadata, name: str) -> tuple[dict, set, list]:
    """The packed tensors for ``layer`` out of the entries that a state dict has for it.

    Args:
        layer: a quantised layer; only looked at.
        tensors: entries by name without the layer's prefix.
        metadata: the state dict's ``_metadata`` for this layer, or None.
        name: the layer's, for messages.

    Returns ``(packed, used, missing)``: the tensors by parameter name ({} when the state dict holds none), the
    names of the entries they come from, and the names that are absent. Raises ValueError saying what came and
    what is wanted.
    """
    native = tensors.keys() & {"qweight", "absmax", "absmax2", "absmax_offset"}
    foreign = {key for key in tensors if key.startswith("weight.") or key in ("SCB", "weight_format")}
    other = foreign | (tensors.keys() & {"weight"})
    if native and other:
        raise ValueError(
            f"{name}: the state dict has {', '.join(sorted(native))} and also {', '.join(sorted(other))}; "
            "wanted one description of the weight"
        )
    if native:
        return read_native(layer, tensors, native, metadata, name)
    if foreign:
        return read_bnb(layer, tensors, other, name), other, []
    if other:
        return read_dense(layer, tensors["weight"], name), other, []
    return {}, set(), list(layer.packed_spec())


def read_native(layer, tensors: dict, present: set, metadata, name: str) -> tuple[dict, set, list]:
    if isinstance(metadata, dict):
        check_metadata(layer, metadata, name)
    spec = layer.packed_spec()
    stored_double = bool(present & {"absmax2", "absmax_offset"})
    if hasattr(layer, "double_quant") and stored_double != layer.double_quant:
        raise ValueError(
            f"{name}: the state dict is {'double' if stored_double else 'not double'} quantised "
            f"({', '.join(f'{key} {describe(tensors[key])}' for key in sorted(present))}), the layer has "
            f"double_quant={layer.double_quant}; build it with double_quant={stored_double}"
        )
    missing = [key for key in spec if key not in present]
    if missing:
        raise ValueError(
            f"{name}: the state dict has {', '.join(sorted(present))} but not {', '.join(missing)}; "
            f"wanted all of {', '.join(spec)}"
        )
    extra = sorted(present - set(spec))
    if extra:
        raise ValueError(f"{name}: unexpected {', '.join(extra)}; wanted {', '.join(spec)}")
    packed = {key: tensors[key] for key in spec}
    for key, (shape, dtype) in spec.items():
        value = packed[key]
        if dtype.is_floating_point and isinstance(value, torch.Tensor) and value.dtype == BITS:
            value = packed[key] = value.view(dtype)
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"{name}.{key}: got {describe(value)}, wanted {str(dtype).removeprefix('torch.')} {list(shape)} "
                f"({layer.describe()})"
            )
    return packed, present, []


def check_metadata(layer, metadata: dict, name: str) -> None:
    """The format recorded with the bytes against the layer's."""
    version = metadata.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{name}: the state dict has format version {version!r}, this bnbq knows {VERSION}: upgrade bnbq"
        )
    for key, wanted in layer.format().items():
        came = metadata.get(key, wanted)
        if came != wanted:
            raise ValueError(
                f"{name}: the state dict was saved with {key}={came!r}, the layer has {key}={wanted!r}; "
                "build the layer with the settings that the state dict was saved with"
            )


def read_dense(layer, weight, name: str) -> dict:
    """A float weight, quantised where it lies."""
    shape = list(layer.weight_shape)
    if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
        raise ValueError(
            f"{name}.weight: got {describe(weight)} without the scales that bitsandbytes stores beside it; "
            "wanted a float weight to quantise, or all of the layer's entries"
        )
    if not isinstance(weight, torch.Tensor) or list(weight.shape) != shape:
        raise ValueError(f"{name}.weight: got {describe(weight)}, wanted a float weight of shape {shape}")
    try:
        return layer.packed(weight)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None


def read_bnb(layer, tensors: dict, used: set, name: str) -> dict:
    """bitsandbytes' entries -> packed tensors, if they are in the layer's own format."""
    from . import checkpoint_bnb

    entries = {key: tensors[key] for key in used}
    for key, value in entries.items():
        if not isinstance(value, torch.Tensor) and not (key == "weight_format" and isinstance(value, str)):
            raise ValueError(f"{name}.{key}: got {describe(value)}, wanted a tensor")
    shape = layer.weight_shape
    if hasattr(layer, "quant_type"):
        packed, settings = checkpoint_bnb.native_from_bnb4(entries, name, shape)
    else:
        packed, settings = checkpoint_bnb.native_from_bnb8(entries, name, shape)
    for key, wanted in layer.format().items():
        if settings.get(key, wanted) != wanted:
            raise ValueError(
                f"{name}: bitsandbytes' checkpoint has {key}={settings[key]!r}, the layer has {key}={wanted!r}; "
                f"build it with {key}={settings[key]!r}"
            )
    for key, (shape, dtype) in layer.packed_spec().items():
        if tuple(packed[key].shape) != shape or packed[key].dtype != dtype:
            raise ValueError(
                f"{name}.{key}: bitsandbytes' checkpoint gives {describe(packed[key])}, wanted "
                f"{str(dtype).removeprefix('torch.')} {list(shape)} ({layer.describe()})"
            )
    return packed
