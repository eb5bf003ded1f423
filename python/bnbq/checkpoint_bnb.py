"""bitsandbytes' checkpoint tensors <-> bnbq's, bit for bit.

Pure functions on dictionaries of torch tensors. bitsandbytes stores for a linear layer::

    4 bit   weight                 u8 [ceil(n * k / 2), 1], or the same bytes as another dtype (quant_storage)
            weight.absmax          f32 [blocks]; u8 [blocks] with double quantisation
            weight.quant_map       f32 [16], the codebook
            weight.nested_absmax, weight.nested_quant_map      f32 [ceil(blocks / 256)], f32 [256]
            weight.quant_state.bitsandbytes__nf4 (__fp4)       u8, JSON: quant_type, blocksize, dtype, shape, nested_*
    8 bit   weight i8 [n, k], SCB f32 [n], weight_format u8 (0, "row")

and bnbq stores ``qweight``, ``absmax`` [, ``absmax2``, ``absmax_offset``]. The packed bytes and the
scales are the same numbers in both, so every conversion is exact and can be undone. Everything is
checked before use: a file may come from anywhere.
"""

from __future__ import annotations

import json
import math
import warnings

import torch

from . import reference

BNB4_KEYS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
BNB8_KEYS = ("weight", "SCB", "weight_format")
QUANT_STATE = "weight.quant_state.bitsandbytes__"
BNB_QUANT_TYPES = ("nf4", "fp4")
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_QUANT_STATE = 65536
"""Bytes of JSON that a quant_state may have; bitsandbytes writes about 100."""
SMALL_BYTES = 1300
"""About what the codebooks and the quant_state of a layer take."""


def bnb_names(format: dict) -> list[str]:
    """Names of the tensors that `bnb_from_native` makes of a layer with that ``format()``."""
    if "quant_type" not in format:
        return list(BNB8_KEYS)
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if format["double_quant"] else []
    return ["weight", "weight.absmax", "weight.quant_map", *nested, QUANT_STATE + format["quant_type"]]


def bnb_from_native(tensors: dict, format: dict, *, shape: tuple, dtype: torch.dtype, layer: str) -> dict:
    """bnbq's tensors of a layer with that ``format()``, 4 bits or 8 -> bitsandbytes'; see the two below."""
    blocksize, quant_type = format["blocksize"], format.get("quant_type")
    if quant_type is None:
        return bnb8_from_native(tensors, blocksize=blocksize, layer=layer)
    return bnb4_from_native(
        tensors, quant_type=quant_type, blocksize=blocksize, shape=shape, dtype=dtype, layer=layer
    )


def read_quant_state(blob: torch.Tensor, layer: str = "layer", matrix: bool = True) -> dict:
    """The JSON of a ``quant_state`` tensor, checked.

    Returns quant_type, blocksize, shape (ints, two of them for a matrix, or None), dtype (torch dtype or None) and,
    with double quantisation, nested_blocksize, nested_dtype (torch dtype) and nested_offset (float).
    """
    where = f"{layer}: quant_state"
    if blob.dtype != torch.uint8 or blob.numel() > MAX_QUANT_STATE:
        raise ValueError(f"{where} is {describe(blob)}; wanted at most {MAX_QUANT_STATE} bytes of JSON as uint8")
    try:
        raw = json.loads(bytes(blob.flatten().tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not UTF-8 JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is a JSON {type(raw).__name__}; wanted an object")
    state = {"quant_type": raw.get("quant_type"), "blocksize": raw.get("blocksize")}
    if state["quant_type"] not in BNB_QUANT_TYPES:
        raise ValueError(f"{where}: quant_type is {state['quant_type']!r}; wanted one of {', '.join(BNB_QUANT_TYPES)}")
    if state["blocksize"] not in reference.BLOCKSIZES or isinstance(state["blocksize"], bool):
        raise ValueError(f"{where}: blocksize is {state['blocksize']!r}; wanted one of {reference.BLOCKSIZES}")
    state["dtype"] = float_dtype(raw.get("dtype"), f"{where}: dtype", optional=True)
    state["shape"] = raw.get("shape")
    if state["shape"] is not None:
        sizes = state["shape"]
        known = isinstance(sizes, list) and (len(sizes) == 2 or not matrix)
        if not (known and all(type(s) is int and 0 < s < 2**40 for s in sizes)):
            raise ValueError(f"{where}: shape is {sizes!r}; wanted {'two ' if matrix else ''}positive integers")
        state["shape"] = tuple(sizes)
    if any(key.startswith("nested_") for key in raw):
        offset, size = raw.get("nested_offset"), raw.get("nested_blocksize")
        if type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > 3.4e38:
            raise ValueError(f"{where}: nested_offset is {offset!r}; wanted a finite number")
        if type(size) is not int or not 0 < size < 2**31:
            raise ValueError(f"{where}: nested_blocksize is {size!r}; wanted a positive integer")
        state.update(
            nested_offset=float(offset),
            nested_blocksize=size,
            nested_dtype=float_dtype(raw.get("nested_dtype", "float32"), f"{where}: nested_dtype"),
        )
    return state


def pack_quant_state(state: dict) -> torch.Tensor:
    """The inverse of ``read_quant_state`` for plain JSON values: u8, on the CPU."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def bnb4_settings(parts: dict, layer: str = "layer") -> dict:
    """Settings of a bitsandbytes 4-bit layer from its small tensors (``weight`` and ``absmax`` need not be there).

    Returns quant_type, blocksize, double_quant, shape, dtype. double_quant is False also where the file
    has it in a form that bnbq does not store (another 8-bit map or block, or half-precision scales):
    such scales are decoded to fp32 when the layer is read.
    """
    parts = with_prefix(parts)
    names = [key for key in parts if key.startswith(QUANT_STATE)]
    if len(names) != 1:
        raise ValueError(
            f"{layer}: {len(names)} quant_state tensors; wanted exactly one, named {QUANT_STATE}nf4 or __fp4"
        )
    state = read_quant_state(parts[names[0]], layer)
    if names[0] != QUANT_STATE + state["quant_type"]:
        raise ValueError(f"{layer}: {names[0]} says quant_type {state['quant_type']!r}")
    if "weight.quant_map" in parts:
        check_codebook(parts["weight.quant_map"], state["quant_type"], layer)
    nested = "nested_offset" in state
    for key in ("weight.nested_absmax", "weight.nested_quant_map"):
        if nested != (key in parts):
            raise ValueError(
                f"{layer}: {key} is {'missing' if nested else 'there'}, but quant_state describes "
                f"{'double quantisation' if nested else 'none'}"
            )
    state["double_quant"] = nested and keeps_double_quant(state, parts["weight.nested_quant_map"])
    return state


def native_from_bnb4(
    parts: dict, layer: str = "layer", shape: tuple | None = None, notes: list | None = None
) -> tuple[dict, dict]:
    """bitsandbytes' tensors of a 4-bit layer -> (bnbq's tensors by parameter name, settings).

    Args:
        parts: the tensors by the names of ``BNB4_KEYS`` (a leading ``weight.`` may be missing from the statistics).
        layer: for messages.
        shape: ``(out_features, in_features)`` the layer must have; None takes what the file says.
        notes: what would be a warning is appended here instead, without the layer's name.

    Tensors share memory with the input where the bytes are the same. Scales that bnbq cannot keep as they
    are (see ``bnb4_settings``) are decoded exactly as bitsandbytes decodes them, with a warning; so are those
    that bitsandbytes writes after a forward on a CPU (absmax in bfloat16, 2-D and transposed).
    """
    parts = with_prefix(parts)
    unknown = sorted(set(parts) - set(BNB4_KEYS))
    missing = [key for key in ("weight", "weight.absmax") if key not in parts]
    if unknown or missing:
        raise ValueError(
            f"{layer}: {'missing ' + ', '.join(missing) if missing else 'unexpected ' + ', '.join(unknown)}"
        )
    settings = bnb4_settings(parts, layer)
    if settings["shape"] is None:
        settings["shape"] = shape
    if settings["shape"] is None:
        raise ValueError(f"{layer}: quant_state names no shape, and none is known")
    if shape is not None and tuple(shape) != settings["shape"]:
        raise ValueError(f"{layer}: quant_state says shape {settings['shape']}; the layer is {tuple(shape)}")
    n, k = settings["shape"]
    blocks = -(-n * k // settings["blocksize"])
    packed = parts["weight"].contiguous().flatten().view(torch.uint8)
    if packed.numel() != -(-n * k // 2):
        raise ValueError(
            f"{layer}: weight is {describe(parts['weight'])}, {packed.numel()} bytes; "
            f"wanted {-(-n * k // 2)} for shape {settings['shape']}"
        )
    absmax, nested = parts["weight.absmax"], "nested_offset" in settings
    if absmax.numel() != blocks:
        raise ValueError(
            f"{layer}: absmax has {absmax.numel()} values; wanted {blocks} for shape {settings['shape']} "
            f"and blocksize {settings['blocksize']}"
        )
    if nested != (absmax.dtype == torch.uint8) or not (nested or absmax.is_floating_point()):
        raise ValueError(f"{layer}: absmax is {describe(absmax)}; wanted {'uint8 codes' if nested else 'float scales'}")
    tensors = {"qweight": packed}
    if nested:
        scales, note = read_nested(parts, settings, layer)
        tensors.update(scales)
    else:
        tensors["absmax"], note = read_absmax(absmax, n, layer)
    if note is not None and notes is not None:
        notes.append(note)
    elif note is not None:
        warnings.warn(f"{layer}: {note}", stacklevel=2)
    if k % settings["blocksize"] == 0:
        tensors["qweight"] = tensors["qweight"].view(n, k // 2)
        tensors["absmax"] = tensors["absmax"].view(n, k // settings["blocksize"])
    return tensors, settings


def bnb4_from_native(
    tensors: dict,
    *,
    quant_type: str,
    blocksize: int,
    shape: tuple,
    dtype=None,
    quant_storage: torch.dtype = torch.uint8,
    layer: str = "layer",
) -> dict:
    """bnbq's tensors of a 4-bit layer -> what bitsandbytes 0.43 and later load, by the names of ``BNB4_KEYS``.

    Args:
        tensors: qweight, absmax and, with double quantisation, absmax2 and absmax_offset.
        shape: ``(out_features, in_features)``.
        dtype: torch dtype that bitsandbytes will dequantise to; None is float32.
        quant_storage: dtype under which the packed bytes are stored; its size must divide their number.
    """
    if quant_type not in BNB_QUANT_TYPES:
        raise ValueError(f"{layer}: bitsandbytes has no {quant_type!r} format; it reads {', '.join(BNB_QUANT_TYPES)}")
    packed = tensors["qweight"].contiguous().view(-1, 1)
    if quant_storage != torch.uint8:
        if packed.numel() % quant_storage.itemsize:
            raise ValueError(f"{layer}: {packed.numel()} packed bytes cannot be stored as {quant_storage}")
        packed = packed.view(-1).view(quant_storage).view(-1, 1)
    device = packed.device
    state = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "shape": list(shape),
    }
    parts = {
        "weight": packed,
        "weight.absmax": tensors["absmax"].contiguous().view(-1),
        "weight.quant_map": codebook(quant_type).to(device),
    }
    if tensors.get("absmax2") is not None:
        parts["weight.nested_absmax"] = tensors["absmax2"].contiguous()
        parts["weight.nested_quant_map"] = dynamic_map().to(device)
        state.update(
            nested_blocksize=reference.ABSMAX_BLOCK,
            nested_dtype="float32",
            nested_offset=float(tensors["absmax_offset"].reshape(())),
        )
    parts[QUANT_STATE + quant_type] = pack_quant_state(state).to(device)
    return parts


def native_from_bnb8(parts: dict, layer: str = "layer", shape: tuple | None = None) -> tuple[dict, dict]:
    """bitsandbytes' tensors of an 8-bit layer (``BNB8_KEYS``) -> (qweight, absmax; settings with the shape).

    ``weight_format`` may be missing (bitsandbytes 0.38) or a string (0.39 to 0.43.0, in pickled files)."""
    unknown = sorted(set(parts) - set(BNB8_KEYS))
    missing = [key for key in ("weight", "SCB") if key not in parts]
    if unknown or missing:
        raise ValueError(
            f"{layer}: {'missing ' + ', '.join(missing) if missing else 'unexpected ' + ', '.join(unknown)}"
        )
    weight, scales = parts["weight"], parts["SCB"]
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"{layer}: weight is {describe(weight)}; wanted int8 with two dimensions")
    if shape is not None and tuple(weight.shape) != tuple(shape):
        raise ValueError(f"{layer}: weight has shape {tuple(weight.shape)}; the layer is {tuple(shape)}")
    if "weight_format" in parts:
        layout = parts["weight_format"]
        if isinstance(layout, torch.Tensor):
            layout = layout.flatten()[:4].tolist()
        if layout not in ("row", [0]):
            raise ValueError(
                f'{layer}: weight_format is {layout!r}; only 0 ("row") can be read. '
                "Other layouts are GPU-specific; save the model again with bitsandbytes 0.45 or later"
            )
    if not scales.is_floating_point() or scales.numel() != weight.shape[0]:
        raise ValueError(f"{layer}: SCB is {describe(scales)}; wanted {weight.shape[0]} floats")
    check_scales(scales, f"{layer}: SCB")
    return (
        {"qweight": weight.contiguous(), "absmax": scales.reshape(-1).float().contiguous()},
        {"shape": tuple(weight.shape)},
    )


def bnb8_from_native(tensors: dict, *, blocksize: int = 0, layer: str = "layer") -> dict:
    """bnbq's tensors of an 8-bit layer -> bitsandbytes'. Only row-wise scales (blocksize 0) exist there."""
    if blocksize:
        raise ValueError(
            f"{layer}: int8 with blocksize {blocksize} cannot be written for bitsandbytes; it has one scale per row"
        )
    return {
        "weight": tensors["qweight"],
        "SCB": tensors["absmax"],
        "weight_format": torch.zeros((), dtype=torch.uint8, device=tensors["qweight"].device),
    }


# ------------------------------------------------------------------ pieces


def with_prefix(parts: dict) -> dict:
    """Names as in a state dict: ``absmax`` becomes ``weight.absmax``."""
    return {
        key if key == "weight" or key.startswith("weight.") else f"weight.{key}": value for key, value in parts.items()
    }


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def float_dtype(name, where: str, optional: bool = False) -> torch.dtype | None:
    if name is None and optional:
        return None
    if name not in FLOAT_DTYPES:
        raise ValueError(f"{where} is {name!r}; wanted one of {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def codebook(quant_type: str) -> torch.Tensor:
    """f32[16] of a 4-bit format."""
    return torch.from_numpy(reference.find_format(quant_type).codebook.copy())


def dynamic_map() -> torch.Tensor:
    """f32[256], the 8-bit type of double-quantised scales."""
    return torch.from_numpy(reference.DYNAMIC_MAP.copy())


def check_codebook(quant_map: torch.Tensor, quant_type: str, layer: str) -> None:
    """Codes mean nothing without their codebook: it must be the one that the kernels hold."""
    wanted = codebook(quant_type)
    if quant_map.numel() != 16 or not torch.equal(quant_map.flatten().float().cpu() + 0.0, wanted + 0.0):
        raise ValueError(
            f"{layer}: quant_map is not the {quant_type} codebook; files with codebooks of their own cannot be read"
        )


def check_scales(scales: torch.Tensor, where: str) -> None:
    if not bool(torch.isfinite(scales).all()):
        bad = int(torch.nonzero(~torch.isfinite(scales.flatten()))[0])
        raise ValueError(f"{where} has {scales.flatten()[bad].item()} at index {bad}; wanted finite scales")


def keeps_double_quant(state: dict, nested_quant_map: torch.Tensor) -> bool:
    return (
        state["nested_blocksize"] == reference.ABSMAX_BLOCK
        and state["nested_dtype"] == torch.float32
        and torch.equal(nested_quant_map.flatten().float().cpu(), dynamic_map())
    )


def read_absmax(absmax: torch.Tensor, n: int, layer: str) -> tuple[torch.Tensor, str | None]:
    """First-level scales as f32, one-dimensional, in the order of the blocks; and a note if they were spoilt."""
    note = None
    if absmax.dim() == 2 and absmax.dtype != torch.float32:
        if absmax.shape[1] != n:
            raise ValueError(f"{layer}: absmax is {describe(absmax)}; wanted one dimension, or [k / blocksize, {n}]")
        note = (
            "bitsandbytes saved this model after a forward pass on a CPU, which rounded its scales to "
            f"{str(absmax.dtype).removeprefix('torch.')} and transposed them. They are read back in order, but not "
            "to full precision; if that model had run again after an earlier save, they are lost. Quantise the "
            "original model again if you can"
        )
        absmax = absmax.t()
    absmax = absmax.reshape(-1).float().contiguous()
    check_scales(absmax, f"{layer}: absmax")
    return absmax, note


def read_nested(parts: dict, settings: dict, layer: str) -> tuple[dict, str | None]:
    """Double-quantised scales, as codes where bnbq stores the same form; else decoded as there, and a note."""
    codes, scales = parts["weight.absmax"].reshape(-1).contiguous(), parts["weight.nested_absmax"].reshape(-1)
    quant_map = parts["weight.nested_quant_map"].reshape(-1)
    size = settings["nested_blocksize"]
    wanted = -(-codes.numel() // size)
    if not scales.is_floating_point() or scales.numel() != wanted:
        raise ValueError(f"{layer}: nested_absmax is {describe(scales)}; wanted {wanted} floats")
    if not quant_map.is_floating_point() or quant_map.numel() != 256:
        raise ValueError(f"{layer}: nested_quant_map is {describe(quant_map)}; wanted 256 floats")
    check_scales(scales, f"{layer}: nested_absmax")
    scales = scales.float().contiguous()
    offset = torch.tensor([settings["nested_offset"]], dtype=torch.float32, device=codes.device)
    if settings["double_quant"]:
        return {"absmax": codes, "absmax2": scales, "absmax_offset": offset}, None
    dtype = settings["nested_dtype"]
    check_scales(quant_map, f"{layer}: nested_quant_map")
    why = (
        f"blocks of {size}"
        if size != reference.ABSMAX_BLOCK
        else f"{str(dtype).removeprefix('torch.')} arithmetic"
        if dtype != torch.float32
        else "an 8-bit map of its own"
    )
    decoded = quant_map.float()[codes.long()] * scales.repeat_interleave(size)[: codes.numel()]
    decoded = (decoded.to(dtype) + offset.reshape(())).float()
    check_scales(decoded, f"{layer}: absmax")
    return {"absmax": decoded}, (
        f"double quantisation with {why}, which bnbq does not store; the scales are decoded to float32 "
        "(the same values, more memory)"
    )
