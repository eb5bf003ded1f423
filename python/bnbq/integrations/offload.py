"""Modules whose tensors a hook of Accelerate keeps in memory or on disk between forwards: read them and change them.

Such a module's parameters are on the meta device. Its hook takes their values from a mapping, ``weights_map``, which
for most modules is a view of one mapping for the whole model: tensors by name, or an index of files.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch

from ..packed import like_held


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether a parameter of the module itself is elsewhere, or nowhere."""
    return any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())


@contextmanager
def onloaded(*modules: torch.nn.Module):
    """Bring what is offloaded of the modules and their submodules to where they compute, to be read."""
    with ExitStack() as stack:
        for part in dict.fromkeys(part for module in modules for part in module.modules() if is_offloaded(part)):
            from accelerate.utils import align_module_device

            stack.enter_context(align_module_device(part))
        yield


def check_readable(module: torch.nn.Module) -> None:
    """ValueError for a module that is on the meta device and that `onloaded` cannot bring from there."""
    from accelerate.utils import has_offloaded_params

    if is_offloaded(module) and not has_offloaded_params(module):
        raise ValueError("has no data, or is offloaded by another hook than Accelerate's; load it into memory")


def check_writable(module: torch.nn.Module) -> None:
    """ValueError for an offloaded module that has no place for `write`."""
    if not is_offloaded(module):
        return
    weights, prefix = source(module)
    if any(in_file(weights, prefix + name) for name in module._parameters) and weights.save_folder is None:
        raise ValueError("stays in the files of the checkpoint; load the model with an offload_folder, to write to")


@torch.no_grad()
def write(module, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the data of a quantised module's parameters, where they are: in the module, or in what its hook reads.

    ``tensors`` has them by name, of the same shapes, in the dtypes of ``packed_spec``. A file of a checkpoint is not
    written to: what came from there goes to the offload folder.
    """
    if not is_offloaded(module):
        module._fill(tensors)
        return
    from accelerate.utils import offload_weight

    weights, prefix = source(module)
    for name, tensor in tensors.items():
        tensor = like_held(tensor, module._parameters[name])
        if in_file(weights, prefix + name):
            offload_weight(tensor, prefix + name, weights.save_folder, weights.index)
        else:
            weights[prefix + name].copy_(tensor)


def source(module: torch.nn.Module):
    """(the mapping that an offloaded module's hook reads from, the prefix of the module's names there)."""
    from accelerate.utils import PrefixedDataset

    weights, prefix = module._hf_hook.weights_map, ""
    while isinstance(weights, PrefixedDataset):
        weights, prefix = weights.dataset, weights.prefix + prefix
    return weights, prefix


def in_file(weights, key: str) -> bool:
    from accelerate.utils import OffloadedWeightsLoader

    return isinstance(weights, OffloadedWeightsLoader) and key in weights.index and key not in weights.state_dict
