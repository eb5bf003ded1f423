"""Replace the linear layers of a model, and on request its embeddings, by quantised ones.

``quantize_model`` does it to any nn.Module; which layers those are, selection.py says. ``make_layer`` and ``put`` are
what the integrations use while they load.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn as torch_nn

from . import experts, nn
from .config import BnbqConfig
from .experts import ExpertWeight, QuantizedExperts
from .matrix import PackedMatrix
from .report import Report, explain, largest_unquantized, report
from .selection import is_linear, resolve_config, select, tied_names

logger = logging.getLogger("bnbq")

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
ENOUGH = 0.9
"""Below this part of the bytes that could have been quantised, quantize_model warns."""


def make_layer(module, config=None, source=None, *, device=None) -> PackedMatrix | QuantizedExperts:
    """A quantised layer for a float one.

    Args:
        module: nn.Linear, Conv1D, nn.Embedding or ExpertWeight; left as it is.
        source: the quantised module that this one is tied to: its packed Parameters are used.
        device: None quantises the weight where it lies (a layer on meta stays unfilled); "meta" makes an
            unfilled layer of the same sizes, to be loaded later.
    """
    config = resolve_config(config)
    if isinstance(module, ExpertWeight):
        on_meta = device is not None and torch.device(device).type == "meta"
        weight = module.weight.detach()
        layer = experts.layer_class(config.bits).from_weight(
            weight.to("meta") if on_meta else weight, module.transposed, **config.layer_settings()
        )
        return layer if device is None else layer.to(device)
    if source is not None:
        layer = make_layer(module, config, device="meta")
        layer.tie_(source)
        if getattr(module, "bias", None) is not None:
            layer.bias = module.bias
        return layer
    if isinstance(module, torch_nn.Embedding):
        kind = nn.Embedding4bit if config.bits == 4 else nn.Embedding8bit
        return kind.from_embedding(module, device, **config.embedding_settings())
    kind = nn.Linear4bit if config.bits == 4 else nn.Linear8bitLt
    if device is not None and torch.device(device).type == "meta":
        weight = nn.dense_weight(module)
        layer = kind(
            weight.shape[1],
            weight.shape[0],
            module.bias is not None,
            weight_dtype=weight.dtype,
            device="meta",
            **config.layer_settings(),
        )
        if layer.bias is not None:
            layer.bias.requires_grad_(module.bias.requires_grad)
        layer.train(module.training)
    else:
        layer = kind.from_linear(module, **config.layer_settings())
        if device is not None:
            layer.to(device)
    keep_hooks(module, layer)
    return layer


def keep_hooks(old: torch_nn.Module, new: torch_nn.Module) -> None:
    """A hook of the user's must not fall silent with the module that it was registered on."""
    for hooks in HOOKS:
        if old.__dict__.get(hooks):
            new.__dict__[hooks] = old.__dict__[hooks]


def put(model: torch_nn.Module, name: str, layer) -> None:
    """Put ``layer`` where ``name`` is in the model: a module, or an experts' Parameter for another or the reverse."""
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    if leaf in parent._parameters:
        delattr(parent, leaf)  # nn.Module takes no module for a Parameter's name
    setattr(parent, leaf, layer)
    if isinstance(layer, QuantizedExperts):
        from .integrations.experts import activate

        activate(parent)
        for projection in experts.projections(parent):  # in one order, whatever the order of replacing
            if projection in parent._modules:
                parent._modules[projection] = parent._modules.pop(projection)


def quantize_model(
    model: torch_nn.Module,
    config=None,
    *,
    device_map=None,
    max_memory: dict | None = None,
    offload_folder=None,
    include=(),
    progress=None,
) -> Report:
    """Quantise the linear layers and expert weights of a model in place, and its embeddings if ``config`` says so.

    Args:
        model: any nn.Module with its weights in memory; on the meta device its layers are replaced unfilled.
        config: BnbqConfig, BitsAndBytesConfig or None (nf4). The head of selection.py says what is kept in float.
        device_map: None leaves every tensor where it is. A device (torch.device, "cpu", "cuda:0", an int) moves
            the model there. "auto", "balanced", "balanced_low_0" and "sequential" let Accelerate plan over the packed
            sizes, within ``max_memory``; a dict gives a device, "cpu" or "disk" by module name. Layers on "cpu"
            and "disk" stay quantised and compute on the CPU.
        offload_folder: where the tensors of "disk" go; a folder of its own is made in it and removed with the model.
        include: names of modules to quantise although a default rule keeps them.
        progress: True shows a bar (tqdm); a function is called with (layers done, layers in all, name).

    Layers are quantised one at a time, where their weights lie, and each float weight is let go before the next.
    Returns the report on the model, whose first line is logged at level INFO to the logger "bnbq". Warns when
    less than 90 % of the bytes outside embeddings and ``skip_modules`` were quantised.

    Raises ValueError for a weight with NaN or Inf, naming the layer and the index, and for names that match nothing;
    TypeError for a model that is itself a layer. The model is usable after an error: layers replaced before
    it stay quantised, the others are as they were.
    """
    if is_linear(model) or isinstance(model, torch_nn.Embedding):
        raise TypeError(
            f"quantize_model: the model is a {type(model).__name__} and cannot replace itself; "
            "use Linear4bit.from_linear or Embedding4bit.from_embedding"
        )
    config = resolve_config(config)
    if device_map is not None:
        from . import placement

        placement.check_device_map(model, device_map, offload_folder)
    selection = select(model, config, include)
    check_hooks(model, selection.modules)
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            owners.setdefault(id(module), []).append(name)
    tied = tied_names(model, selection.modules) if config.quantize_embeddings else {}
    ordered = sorted(selection.modules, key=tied.__contains__)  # what is tied follows what it is tied to
    places = {}
    for name in ordered:
        module = selection.modules[name]
        expert = isinstance(module, ExpertWeight)
        places[name] = [f"{at}.{module.name}" for at in owners[id(module.owner)]] if expert else owners[id(module)]
    kept = selection.kept
    del selection, module  # nothing here may keep a float weight alive

    steps = Progress(progress, len(places))
    for done, (name, names) in enumerate(places.items()):
        try:
            source = model.get_submodule(tied[name]) if name in tied else None
            layer = make_layer(experts.float_part(model, name), config, source)
        except (ValueError, TypeError, RuntimeError) as error:
            kind = next(kind for kind in (ValueError, TypeError, RuntimeError) if isinstance(error, kind))
            raise kind(
                f"{name}: {error} ({done} of {len(places)} layers are quantised and stay so; "
                "this one and the rest are as they were)"
            ) from error
        for place in names:
            put(model, place, layer)
        steps(done + 1, name)
    mark(model, config)
    result = report(model, kept=kept)
    if device_map is not None:
        placement.place(model, device_map, max_memory, offload_folder)
        for row in result.quantized:
            row.kernel = explain(model.get_submodule(row.name)).kernel
    logger.info("%s", result.summary())
    warn_about_rest(result)
    return result


def check_hooks(model, modules) -> None:
    """A model that Accelerate dispatched computes through hooks, which a new layer would not have."""
    for name, module in modules.items():
        if hasattr(getattr(module, "owner", module), "_hf_hook"):
            raise ValueError(
                f"{name} has a hook of Accelerate: the model was dispatched with a device_map. "
                "Quantise before dispatching "
                "(quantize_model takes a device_map), or while loading (from_pretrained with quantization_config)"
            )
    floats = [name for name, module in modules.items() if not module.weight.is_meta]
    if floats and len(floats) < len(modules):
        name = next(name for name, module in modules.items() if module.weight.is_meta)
        raise ValueError(
            f"{name}.weight is on the meta device while {floats[0]}.weight has data; load the whole model first"
        )


def mark(model: torch_nn.Module, config: BnbqConfig) -> None:
    """Leave the settings on the model, where saving finds them."""
    model.bnbq_config = config
    if any(base.__module__.startswith("diffusers.") for base in type(model).__mro__):
        model.save_pretrained = refuse_to_save
    elif hasattr(model, "save_pretrained"):
        from .integrations import transformers

        attach = getattr(transformers, "attach_config", None)
        if attach is not None:
            attach(model, config)


def refuse_to_save(*arguments, **keywords):
    """``save_pretrained`` of a quantised diffusers model: its from_pretrained would merely warn and start from random
    weights, since diffusers knows only its own quantisers."""
    raise ValueError(
        "diffusers' from_pretrained cannot load what bnbq quantised: use bnbq.save(model, directory) "
        "and bnbq.load(model_class.from_config(config), directory)"
    )


def warn_about_rest(result: Report) -> None:
    """One warning when a good part of the model was not quantised and no rule of the user's says so."""
    quantized = sum(row.bytes_as_float for row in result.rows if row.quantized)
    others = [row for row in result.rows if not row.quantized and not row.why.startswith(("embedding", "skip_modules"))]
    rest = sum(row.bytes for row in others)
    if rest and quantized < ENOUGH * (quantized + rest):
        warnings.warn(
            f"quantize_model: only {quantized / (quantized + rest):.0%} of the parameter bytes outside embeddings "
            "were quantised; "
            f"the largest left: {largest_unquantized(others)}",
            stacklevel=3,
        )


class Progress:
    """``progress`` of quantize_model: nothing, a bar, or the user's function."""

    def __init__(self, progress, total: int):
        self.total, self.call, self.bar = total, None, None
        if progress is True:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="layer", desc="quantising")
        elif callable(progress):
            self.call = progress
        elif progress not in (None, False):
            raise TypeError(f"progress: got {progress!r}, expected True or a function of (done, total, name)")

    def __call__(self, done: int, name: str) -> None:
        if self.bar is not None:
            self.bar.update(1)
            if done == self.total:
                self.bar.close()
        elif self.call is not None:
            self.call(done, self.total, name)
