"""Replace the linear layers of a model, and on request its embeddings, by quantised ones.

``quantize_model`` does it to any nn.Module; ``select_modules`` and ``make_layer`` are the two halves that the
transformers integration uses while it loads.

What is replaced: modules of exactly the type nn.Linear, transformers' Conv1D, and the 3-D Parameters of modules that
compute through transformers' experts interface (experts.py), which become a module in their place. Subclasses of
nn.Linear are left alone, since nothing is known of their forward.

What is kept although it could be replaced, and how it is recognised (``keep_reason`` is the code):

    output head          what get_output_embeddings() returns; a component lm_head, embed_out, head, heads
    classifier head      a component score, classifier, classification_head, qa_outputs
    tied weight          another parameter name refers to the same tensor
    MoE router           a component router (or ending in _router), shared_expert_gate, or a last component gate
                         or wg in a module that has experts (gate_proj is not a router)
    single output        out_features == 1: a value or gate that decides much and weighs nothing
    kept in fp32         the model's _keep_in_fp32_modules
    last layer           the owner of the last parameter of a transformers model, as transformers does
    adapter              layers that PEFT added beside or in place of others
    checkpoint format    expert weights, if the config wants bitsandbytes' format, which has none

With ``quantize_embeddings`` nn.Embedding and its subclasses are candidates too (a subclass keeps its forward). Kept are
embeddings of a transformers model that no get_input_embeddings() returns: positions, token types. Where an embedding is
quantised, all that is tied to it is too and shares its bytes, the output head included; where one of them cannot be,
or is skipped, all stay float.

``skip_modules`` adds to these; ``include_modules`` overrides them. A name there means a run of whole components of a
module's dotted name: "lm_head", "mlp.gate" and "layers.0" match in "model.layers.0.mlp.gate"; "gat" and "layers.1"
(in "layers.11") do not. There are no wildcards, and a name that matches nothing is an error.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn as torch_nn

from . import experts, nn
from .config import BnbqConfig, check_names
from .experts import ExpertWeight, QuantizedExperts
from .matrix import PackedMatrix
from .packed import PackedModule
from .report import Report, explain, largest_unquantized, report

logger = logging.getLogger("bnbq")

OUTPUT_HEADS = {"lm_head", "embed_out", "head", "heads"}
CLASSIFIER_HEADS = {"score", "classifier", "classification_head", "qa_outputs"}
GATES = {"gate", "wg"}
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


TIE_REASONS = ("output head", "tied weight", "last layer")
"""Why a layer is kept, where that gives way when the embedding that it is tied to is quantised."""


class Selection(NamedTuple):
    """Linear layers, expert weights (and embeddings) by name: those to replace, and why each other one is kept."""

    modules: dict[str, torch_nn.Module | ExpertWeight]
    kept: dict[str, str]


def resolve_config(config) -> BnbqConfig:
    """None, a BnbqConfig, a BitsAndBytesConfig, or the JSON of either -> BnbqConfig."""
    if config is None:
        return BnbqConfig()
    if isinstance(config, BnbqConfig):
        return config
    if isinstance(config, dict) and not any("load_in_" in key for key in config):
        return BnbqConfig.from_dict(config)
    return BnbqConfig.from_bnb(config)


# ------------------------------------------------------------------ which layers


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is a run of whole components of the dotted ``name``."""
    return f".{pattern}." in f".{name}."


def select(model: torch_nn.Module, config=None, include=(), strict: bool = True) -> Selection:
    """The linear layers, expert weights and embeddings of ``model`` that ``config`` quantises, and why others are kept.

    Args:
        include: module names to quantise although a default rule would keep them, beside those in the config.
        strict: raise ValueError for a name in skip_modules or include that matches no module. The names of
            the default rules never raise: "lm_head" is skipped in a model without one.

    A name that is both skipped and included is a ValueError, as is one that includes what cannot be replaced.
    """
    config = resolve_config(config)
    skipped = config.skip_modules or []
    included = [*(config.include_modules or []), *(check_names(include, "include") or [])]
    if strict:
        check_patterns(model, skipped, "skip_modules")
        check_patterns(model, included, "include")
    facts = Facts(model)
    chosen, kept = {}, {}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) or (config.quantize_embeddings and isinstance(module, torch_nn.Embedding))
    }
    for name, module in {**candidates, **experts.find(model)}.items():
        skip = next((pattern for pattern in skipped if matches(pattern, name)), None)
        force = next((pattern for pattern in included if matches(pattern, name)), None)
        if skip and force:
            raise ValueError(f"{name} is both in skip_modules ({skip!r}) and in include ({force!r})")
        impossible = not_replaceable(module, config)
        if impossible and force == name:
            raise ValueError(f"include: {name} cannot be quantised: {impossible}")
        reason = (
            impossible
            or (f"skip_modules: {skip}" if skip else None)
            or (None if force else keep_reason(name, module, facts))
        )
        if reason:
            kept[name] = reason
        else:
            chosen[name] = module
    if config.quantize_embeddings:
        settle_ties(facts, chosen, kept)
    return Selection(chosen, kept)


def select_modules(model: torch_nn.Module, config=None, include=(), strict: bool = True) -> dict:
    """Name -> module, or ExpertWeight, for what ``config`` quantises. Arguments as in ``select``."""
    return select(model, config, include, strict).modules


def is_linear(module: torch_nn.Module) -> bool:
    """Whether a module is a linear layer of torch or transformers, float or quantised."""
    return isinstance(module, torch_nn.Linear) or nn.is_conv1d(module)


def settle_ties(facts: Facts, chosen: dict, kept: dict) -> None:
    """Quantise all that is tied to a chosen embedding, or nothing of it."""
    groups = {}
    for name in [*chosen, *kept]:
        if name in facts.modules:  # expert weights are no modules, and tied to nothing
            groups.setdefault(facts.root(name), []).append(name)
    for names in groups.values():
        if not any(name in chosen and isinstance(chosen[name], torch_nn.Embedding) for name in names):
            continue
        obstacle = next((name for name in names if kept.get(name, TIE_REASONS[0]) not in TIE_REASONS), None)
        for name in names:
            if obstacle is None and name in kept:
                del kept[name]
                chosen[name] = facts.modules[name]
            elif obstacle is not None and name in chosen:
                del chosen[name]
                kept[name] = f"tied to {obstacle}, which stays float"


def tied_names(model: torch_nn.Module, names) -> dict[str, str]:
    """Of the modules of these names, those with the weight of another one -> the other, the same for all that share
    it: an embedding, if there is one. Tells what ``model`` says before anything is replaced."""
    facts, sources = Facts(model), {}
    roots = {name: facts.root(name) for name in names if name in facts.modules}  # expert weights are no modules
    for name, root in roots.items():
        if name == root or isinstance(facts.modules[name], torch_nn.Embedding):
            sources.setdefault(root, name)
        if name == root and isinstance(facts.modules[name], torch_nn.Embedding):
            sources[root] = name
    return {name: sources[root] for name, root in roots.items() if sources.get(root, name) != name}


def check_patterns(model: torch_nn.Module, patterns, argument: str) -> None:
    """ValueError for a name that matches no module and no parameter of the model."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if pattern in OUTPUT_HEADS | CLASSIFIER_HEADS or any(matches(pattern, name) for name in names):
            continue
        components = sorted({part for name in names for part in name.split(".") if part} | set(names))
        close = difflib.get_close_matches(pattern, components, 3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        if any(character in pattern for character in "*?[](|^$\\"):
            hint = "; names are matched literally, without wildcards"
        raise ValueError(f"{argument}: {pattern!r} matches no module of {type(model).__name__}{hint}")


class Facts:
    """What the default rules need to know of a model as a whole."""

    def __init__(self, model: torch_nn.Module):
        self.modules = dict(model.named_modules())
        is_hf = hasattr(model, "get_output_embeddings")
        try:
            head = model.get_output_embeddings() if is_hf else None
        except NotImplementedError:
            head = None
        self.heads = {
            id(module) for module in (head if isinstance(head, (list, tuple)) else [head]) if module is not None
        }
        uses = Counter(id(parameter) for module in self.modules.values() for parameter in module._parameters.values())
        self.tied = {identity for identity, count in uses.items() if count > 1}
        declared = getattr(model, "all_tied_weights_keys", None)
        declared = declared.items() if isinstance(declared, dict) else ()
        self.sources = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in declared}
        self.tied_names = self.sources.keys() | set(self.sources.values())
        self.owners = {}  # id of a weight -> the first module that has it
        for name, module in self.modules.items():
            self.owners.setdefault(id(module._parameters.get("weight")), name)
        tables = [table for module in self.modules.values() for table in input_embeddings(module)]
        self.token_tables = {id(table) for table in tables} if is_hf else None
        self.fp32 = [
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        ]
        last = next((name for name, _ in reversed(list(model.named_parameters()))), "")
        self.last = last.rpartition(".")[0] if is_hf else None

    def root(self, name: str) -> str:
        """The module whose weight is that of module ``name``: itself, if it is not tied. On meta, where ties are made
        later, what the model declares counts."""
        weight = self.modules[name]._parameters.get("weight")
        if weight is None:
            return name
        name = self.owners[id(weight)]
        return self.sources.get(name, name) if weight.is_meta else name

    def is_token_table(self, name: str) -> bool:
        """Whether an embedding, or what it is tied to, looks up tokens; of a model that does not say, each does."""
        if self.token_tables is None:
            return True
        return any(id(self.modules[n]) in self.token_tables for n in (name, self.root(name)) if n in self.modules)

    def ancestors(self, name: str) -> Iterator[tuple[torch_nn.Module, str]]:
        """Each module above ``name`` and the rest of the name from there, innermost first."""
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            yield self.modules[".".join(parts[:i])], ".".join(parts[i:])


def input_embeddings(module: torch_nn.Module) -> list[torch_nn.Module]:
    """What a transformers model calls its input embeddings; [] for other modules, and for models without tokens."""
    try:
        table = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    except (NotImplementedError, AttributeError):
        return []
    return [] if table is None else [table]


def not_replaceable(module, config: BnbqConfig) -> str | None:
    """Why a layer or an expert weight cannot be replaced at all, or None."""
    if isinstance(module, ExpertWeight):
        return "bitsandbytes' format has no experts" if config.checkpoint_format == "bitsandbytes" else None
    if isinstance(module, PackedModule):
        return "already quantised"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm writes to the weight"
    if isinstance(module, torch_nn.Linear) and type(module) is not torch_nn.Linear:
        return f"subclass of nn.Linear: {type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module._parameters.get("weight"), torch_nn.Parameter):
        return "its weight is computed, by weight_norm, spectral_norm or pruning"
    return None


def keep_reason(name: str, module: torch_nn.Module, facts: Facts) -> str | None:
    """The default rule (see the head of this file) that keeps a layer or an expert weight in float, or None."""
    parts = set(name.split("."))
    last = name.rpartition(".")[2]
    if isinstance(module, torch_nn.Embedding):
        return (None if facts.is_token_table(name) else "not of tokens") or kept_by_owner(name, parts, facts)
    if id(module) in facts.heads or parts & OUTPUT_HEADS:
        return "output head"
    parent = next(facts.ancestors(name))[0] if name else None
    if (
        any(part == "router" or part.endswith("_router") for part in parts)
        or last == "shared_expert_gate"
        or (last in GATES and looks_like_moe(parent))
    ):
        return "MoE router"
    if parts & CLASSIFIER_HEADS:
        return "classifier head"
    if id(module.weight) in facts.tied or name in facts.tied_names:
        return "tied weight"
    if not isinstance(module, ExpertWeight) and nn.dense_weight(module).shape[0] == 1:
        return "single output"
    return kept_by_owner(name, parts, facts)


def kept_by_owner(name: str, parts: set, facts: Facts) -> str | None:
    """The rules that look at where a module is, and not at what it is."""
    if any(matches(pattern, name) for pattern in facts.fp32):
        return "kept in fp32 by the model"
    if name == facts.last:
        return "last layer"
    if name and any(
        hasattr(above, "base_layer") and not rest.startswith("base_layer") for above, rest in facts.ancestors(name)
    ):
        return "adapter"
    if "modules_to_save" in parts:
        return "adapter"
    return None


def looks_like_moe(module: torch_nn.Module) -> bool:
    """Whether a module chooses among experts: it has them, or its class is named so."""
    kind = type(module).__name__.lower()
    return any("expert" in child for child in (*module._modules, *module._parameters)) or any(
        word in kind for word in ("moe", "sparse", "expert")
    )


# ------------------------------------------------------------------ replacing


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
        config: BnbqConfig, BitsAndBytesConfig or None (nf4). See the head of this file for what is kept in float.
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


set_compute_dtype = nn.set_compute_dtype
