"""Put a quantised model on its devices: the ``device_map`` of quantize_model.

Accelerate plans and moves; the sizes it sees are those of the packed tensors, which are ordinary Parameters. Modules
on "cpu" and "disk" compute on the CPU, where Accelerate would by default stream their weights to the first GPU: the
packed layers run there, and moving the activations is cheaper.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from . import _bnbq, experts

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(model: torch.nn.Module, device_map, offload_folder=None) -> None:
    """TypeError or ValueError for a device_map that cannot be meant, before anything is quantised."""
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return
    entries = device_map if isinstance(device_map, Mapping) else {"": device_map}
    if not entries:
        raise ValueError("device_map: got an empty dict, expected devices by module name, such as {'': 'cpu'}")
    names = {name for name, _ in model.named_modules(remove_duplicate=False)} | {
        name for name, _ in model.named_parameters()
    }
    for name, device in entries.items():
        if name not in names:
            raise ValueError(f"device_map: {name!r} is no module of {type(model).__name__}")
        if as_device(device) == "disk":
            check_folder(name, offload_folder)
        else:
            check_device_is_there(as_device(device))
    if "" not in entries:
        lost = [
            tensor
            for tensor in model.state_dict()
            if not any(tensor == name or tensor.startswith(f"{name}.") for name in entries)
        ]
        if lost:
            raise ValueError(
                f"device_map: nothing says where {lost[0]} goes ({len(lost)} tensors in all); "
                "name its module, or '' for the rest"
            )


def flatten(model: torch.nn.Module, device_map: Mapping) -> dict:
    """The same devices without entries inside others: Accelerate would move all of a module to its entry's device, and
    fail where some of it is on disk. A map without such entries comes back as it is.

    Raises ValueError for a parameter that would be on disk on its own: Accelerate brings whole modules.
    """
    split = set()  # modules with entries of other devices inside
    for name, device in device_map.items():
        above = owners(name)
        if any(device_map.get(owner, device) != device for owner in above):
            split.update(above)
    if not split:
        return dict(device_map)
    flat, weights = {}, experts.find(model)  # which are, or become, modules

    def visit(name: str, module: torch.nn.Module, device) -> None:
        device = device_map.get(name, device)
        if name not in split:
            flat[name] = device
            return
        prefix = f"{name}." if name else ""
        for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            flat[prefix + leaf] = device_map.get(prefix + leaf, device)
            if flat[prefix + leaf] == "disk" and leaf in module._parameters and prefix + leaf not in weights:
                raise ValueError(
                    f"device_map: {prefix + leaf} would be on disk, but not all of {name or 'the model'}; Accelerate "
                    f"moves the tensors of a module together, so give {name or 'it'} one device"
                )
        for child, part in module.named_children():
            visit(prefix + child, part, device)

    visit("", model, None)
    return {name: device for name, device in flat.items() if device is not None}


def owners(name: str) -> list[str]:
    """The modules that hold the one of this name: "a.b", "a" and "" (the model) of "a.b.c"."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in reversed(range(len(parts)))]


def as_device(value):
    """One entry: "disk" or a torch.device; a bare int is a CUDA device, as in Accelerate."""
    if value == "disk":
        return "disk"
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(
            f"device_map: got {value!r}, expected a device such as 'cpu', 'cuda:0', 0 or 'disk', "
            f"or one of {', '.join(STRATEGIES)}"
        )
    try:
        return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"device_map: {value!r} is neither a device, nor 'disk', nor one of {', '.join(STRATEGIES)}"
        ) from None


def has_cuda_build() -> bool:
    return bool(_bnbq.build_info()["cuda"])


def check_device_is_there(device: torch.device) -> None:
    """RuntimeError for a device for which this build has no kernels, or that this machine does not have."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise RuntimeError(f"device_map: got {str(device)!r}, but bnbq has kernels for CPUs and CUDA only")
    if not has_cuda_build():
        raise RuntimeError(
            f"device_map: got {str(device)!r}, but this build of bnbq has no CUDA kernels; expected 'cpu' or 'disk'"
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise RuntimeError(f"device_map: got {str(device)!r}, but this machine has {count} CUDA devices")


def check_folder(module: str, offload_folder) -> None:
    if offload_folder is None:
        raise ValueError(f"device_map: {module or 'the model'} goes to disk; say where with offload_folder")


def accelerate_name(device):
    """A device as Accelerate's device maps have it: "cpu", "disk", or the index of a GPU."""
    if device == "disk" or device.type == "cpu":
        return str(device)
    return device.index if device.type == "cuda" and device.index is not None else str(device)


def place(model: torch.nn.Module, device_map, max_memory: dict | None = None, offload_folder=None) -> None:
    """Move ``model``, or dispatch it with Accelerate where it needs more than one device or the disk.

    Args: those of quantize_model; ``device_map`` has passed ``check_device_map``. Sets ``model.hf_device_map``.
    Raises ValueError if something goes to disk and there is no ``offload_folder``, ImportError without Accelerate.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        device_map = plan(model, device_map, max_memory)
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    device_map = flatten(model, device_map)
    devices = {name: as_device(device) for name, device in device_map.items()}
    if len(set(devices.values())) == 1 and "disk" not in devices.values():
        model.to(next(iter(devices.values())))
        model.hf_device_map = dict(device_map)
        return
    accelerate = import_accelerate()
    devices = {name: accelerate_name(device) for name, device in devices.items()}
    folder = None
    if "disk" in devices.values():
        folder = offload(model, [name for name, device in devices.items() if device == "disk"], offload_folder)
    on_cpu = {"cpu", "disk"} & set(devices.values())
    accelerate.dispatch_model(model, devices, main_device="cpu" if on_cpu else None, offload_dir=folder)


def plan(model: torch.nn.Module, strategy: str, max_memory: dict | None = None) -> dict:
    """Accelerate's device map for the packed sizes: module name -> device, "cpu" or "disk"."""
    accelerate = import_accelerate()
    whole = list(getattr(model, "_no_split_modules", None) or [])
    if strategy != "sequential":
        max_memory = accelerate.utils.get_balanced_memory(
            model, max_memory, no_split_module_classes=whole, low_zero=strategy == "balanced_low_0"
        )
    return accelerate.infer_auto_device_map(model, max_memory, no_split_module_classes=whole)


def offload(model: torch.nn.Module, modules: list[str], offload_folder) -> Path:
    """Write the tensors of some modules for Accelerate to read back, into a new folder in ``offload_folder``.

    A folder of its own: Accelerate takes an index.json that it finds for its own, so a second model in the same
    folder would compute with the weights of the first. It is removed when the model is.
    """
    check_folder(modules[0], offload_folder)
    Path(offload_folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bnbq-", dir=offload_folder))
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    inside = tuple(f"{name}." for name in modules if name)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "" in modules or name in modules or name.startswith(inside)
    }
    import_accelerate().utils.offload_state_dict(folder, tensors)
    return folder


def import_accelerate():
    try:
        import accelerate
    except ImportError:
        raise ImportError(
            "device_map: more than one device, or the disk, needs accelerate: pip install accelerate"
        ) from None
    return accelerate
