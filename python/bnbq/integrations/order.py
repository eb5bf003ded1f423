"""The order of a model's modules, from which Transformers reads its dtype.

``PreTrainedModel.dtype`` is that of the first float Parameter, and inputs are cast to it. Where that is the absmax of a
layer without bias, as in vision towers that begin with a bare projection, it would say float32.
"""

from __future__ import annotations

from torch import nn

from ..packed import PackedModule

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Their order means something."""


def put_floats_first(model: nn.Module) -> None:
    """Let no PreTrainedModel in ``model`` begin with packed scales if another order of its modules avoids it. Names,
    and so state dicts, stay as they are."""
    from transformers import PreTrainedModel  # which may be the one that is importing us

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            begins_with_float(module)


def begins_with_float(module: nn.Module) -> bool | None:
    """Is the first float Parameter a model's own, after children have changed places if need be? None: it has none."""
    own = next((name for name, p in module._parameters.items() if p is not None and p.is_floating_point()), None)
    if own is not None:
        return not (isinstance(module, PackedModule) and own in module.packed_spec())
    answer = None
    for name, child in list(module.named_children()):
        found = begins_with_float(child)
        if found and answer is False:
            move_to_front(module, name)
        if found or isinstance(module, CONTAINERS) and found is not None:
            return found
        answer = False if found is False else answer
    return answer


def move_to_front(module: nn.Module, name: str) -> None:
    rest = [other for other in module._modules if other != name]
    for other in rest:
        module._modules[other] = module._modules.pop(other)
