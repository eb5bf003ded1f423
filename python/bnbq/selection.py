"""Which layers of a model are quantised, and why the others are not.

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
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn as torch_nn

from . import experts, nn
from .config import BnbqConfig, check_names
from .experts import ExpertWeight
from .packed import PackedModule

OUTPUT_HEADS = {"lm_head", "embed_out", "head", "heads"}
CLASSIFIER_HEADS = {"score", "classifier", "classification_head", "qa_outputs"}
GATES = {"gate", "wg"}
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
