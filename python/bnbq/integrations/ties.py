"""Weights that a Transformers model ties, an output head to an embedding above all, where both are quantised.

Transformers ties Parameters by the names that a model class declares (``lm_head.weight``), again and again: after
loading, after resizing, before saving. It is told the names of the packed Parameters instead.
"""

from __future__ import annotations

import torch

from ..checkpoint import PACKED_NAMES
from ..packed import PackedModule
from ..state import LIKE


def name_ties(model) -> None:
    """Have Transformers tie the packed tensors of quantised layers, and the weights of float ones.

    It ties by the names of Parameters that a model class declares, ``lm_head.weight``. What replaces them is set on
    the models alone. Idempotent, and undone by calling it again with float layers in place.
    """
    for part in model.modules():
        declared, named = part.__dict__.get("all_tied_weights_keys") or {}, {}
        for target, source in declared.items():
            (name, _, leaf), (other, _, _) = target.rpartition("."), source.rpartition(".")
            if leaf in ("weight", "qweight"):
                layers = part.get_submodule(name), part.get_submodule(other)
                packed = all(isinstance(layer, PackedModule) for layer in layers)
                leaves = layers[0].tied_parameters(layers[1]) if packed else ["weight"]
                named |= {f"{name}.{leaf}": f"{other}.{leaf}" for leaf in leaves}
            elif leaf not in (LIKE, *PACKED_NAMES):
                named[target] = source
        if named != declared:
            part.all_tied_weights_keys, part._tied_weights_keys = named, dict(named)


def untie_rest(layer, other) -> None:
    """Where the files have two weights for what the config says is tied, Transformers has tied tensors that happen to
    be equal: none is then."""
    if layer.qweight is not other.qweight:
        for name in layer.tied_parameters(other):
            if layer._parameters[name] is other._parameters[name]:
                layer._parameters[name] = torch.nn.Parameter(layer._parameters[name].clone(), requires_grad=False)
