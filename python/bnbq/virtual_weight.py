"""The ``weight`` of a quantised layer: dequantised when read, requantised when written.

A quantised layer stores ``qweight`` and scales and no dense weight, yet much code (PEFT's merges,
Accelerate, ``nn.init``, models that look at ``layer.weight.dtype``) reads and writes ``layer.weight``.
Two classes serve it:

* ``VirtualWeight`` is what ``layer.weight`` returns: a shell with the logical shape, the dtype and
  the device of the weight and no data. Looking at those costs nothing; every other operation works on
  a dense copy. It passes ``isinstance(..., nn.Parameter)`` and is never trainable.
* ``DenseWeight`` is the dense copy, what ``layer.weight.data`` returns. It is an ordinary tensor that
  remembers its layer: after an in-place operation on it, or on a view of it, the layer is requantised
  with the result. Anything computed from it that does not share its memory is a plain tensor.

So ``layer.weight.data += delta``, ``layer.weight.data[0].zero_()`` and ``layer.weight.copy_(w)`` all
leave the layer as if ``w`` had been quantised afresh.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

# What a shell answers itself: attributes and functions that need no values.
_ATTRIBUTES = """
    shape dtype device ndim layout names itemsize nbytes grad grad_fn requires_grad is_leaf retains_grad output_nr
    is_cpu is_cuda is_meta is_mps is_xpu is_hpu is_ipu is_xla is_maia is_mtia is_vulkan is_mkldnn is_nested is_quantized
    is_sparse is_sparse_csr volatile _version _base _grad _backward_hooks _is_view
    size dim ndimension numel nelement stride storage_offset element_size is_contiguous get_device has_names
    is_floating_point is_complex is_signed is_conj is_neg is_inference is_shared is_same_size __len__ __hash__
"""
ON_THE_SHELL = frozenset(_ATTRIBUTES.split())


class QuantState(NamedTuple):
    """How a 4-bit weight is stored, under the name by which libraries ask bitsandbytes for it."""

    quant_type: str
    blocksize: int
    nested: bool
    shape: torch.Size
    dtype: torch.dtype


class DenseWeight(torch.Tensor):
    """A dequantised weight that requantises its layer when it is written to. Made by ``DenseWeight.of``."""

    _owner = None  # weak reference to the layer
    _root = None  # for a view, the whole weight that it is a view of

    @staticmethod
    def of(layer) -> DenseWeight:
        """The layer's weight [n, k] in its ``weight_dtype``. Ordinary even inside ``torch.inference_mode``,
        whose tensors have no version counter and would hide that they were written to."""
        with torch.inference_mode(False):
            dense = layer.dequantize()
        return _writable(dense, weakref.ref(layer), None)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A list: a tensor must be compared by identity, and the same one twice does no harm.
        given = [
            leaf
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, DenseWeight) and leaf._owner is not None
        ]
        with torch._C.DisableTorchFunctionSubclass():
            before = [tensor._version for tensor in given]
            result = func(*args, **kwargs)
            written = {
                id(tensor._whole()): tensor
                for tensor, version in zip(given, before, strict=True)
                if tensor._version != version
            }
            for tensor in written.values():
                tensor._write_back()
            if not given or not isinstance(result, (torch.Tensor, list, tuple, dict)):
                return _read_only(result)
            return pytree.tree_map_only(torch.Tensor, lambda tensor: _follow(tensor, given), result)

    def _whole(self):
        return self if self._root is None else self._root

    def _write_back(self) -> None:
        layer = self._owner()
        if layer is not None:  # a layer that is gone has nothing to keep up to date
            layer.quantize_(self._whole().as_subclass(torch.Tensor).detach())

    # A copy has its own memory: it is plain, as a copy of a parameter's data is.
    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunctionSubclass():
            copy = self.detach().clone().as_subclass(torch.Tensor)
        if getattr(self, "_is_param", False):  # nn.Parameter(layer.weight.data)
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.detach().as_subclass(torch.Tensor)
            plain = torch.nn.Parameter(plain, self.requires_grad) if getattr(self, "_is_param", False) else plain
            return plain.__reduce_ex__(protocol)


def _follow(result: torch.Tensor, given: list[DenseWeight]) -> torch.Tensor:
    """A result that lies in a dense weight's memory becomes a view that writes through; others stay plain."""
    if isinstance(result, DenseWeight):
        return result
    for source in given:
        if result.device == source.device and result.device.type != "meta" and _storage(result) == _storage(source):
            return _writable(result, source._owner, source._whole())
    return result


def _writable(tensor: torch.Tensor, owner, root) -> DenseWeight:
    # Not as_subclass, which makes a view: autograd forbids an in-place operation with a delta that requires
    # a gradient on a view made under no_grad. As with a parameter's data, the graph ends here.
    result = torch.Tensor._make_subclass(DenseWeight, tensor)
    result._owner, result._root = owner, root
    return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


def _read_only(result):
    """A NumPy view of the dense copy cannot write through: writing to it is an error rather than lost."""
    if type(result).__module__ == "numpy" and hasattr(result, "flags"):
        result.flags.writeable = False
    return result


class VirtualWeight(torch.Tensor):
    """The shell that ``layer.weight`` returns: float[n, k] on the layer's device, without data of its own."""

    _is_param = True  # isinstance(weight, nn.Parameter)
    _is_hf_initialized = True  # transformers' initialisers leave it alone

    @staticmethod
    def __new__(cls, layer):
        qweight = layer._parameters["qweight"]
        shell = torch.Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=layer.weight_dtype, device=qweight.device
        )
        shell._layer = layer
        return shell

    @property
    def data(self) -> DenseWeight:
        return DenseWeight.of(self._layer)

    @data.setter
    def data(self, value) -> None:
        self._layer.assign_weight(value)

    @property
    def quant_state(self) -> QuantState:
        """Never None, also while the tensors are on meta: Accelerate takes None for a layer to be quantised."""
        layer = self._layer
        if not hasattr(layer, "quant_type"):
            raise AttributeError("an 8-bit weight has SCB, not quant_state")
        return QuantState(layer.quant_type, layer.blocksize, layer.double_quant, self.shape, self.dtype)

    @property
    def SCB(self) -> torch.Tensor:
        """The row scales of an 8-bit weight, by bitsandbytes' name; never None."""
        if hasattr(self._layer, "quant_type"):
            raise AttributeError("a 4-bit weight has quant_state, not SCB")
        return self._layer.packed_tensors()["absmax"]

    def data_ptr(self) -> int:
        """Address of the packed bytes: equal for two weights exactly when their layers share them."""
        return self._layer._parameters["qweight"].data_ptr()

    def untyped_storage(self):
        return self._layer._parameters["qweight"].untyped_storage()

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise RuntimeError(
                f"{type(self._layer).__name__}: the weight is quantised and cannot be trained; train an adapter on it"
            )
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__"):  # an attribute of Tensor
            name = getattr(func.__self__, "__name__", name)
            if name == "requires_grad" and len(args) == 2:
                return args[0].requires_grad_(args[1])
        if name in ON_THE_SHELL:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(VirtualWeight, lambda shell: shell.data, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Operations that reach the dispatcher past ``__torch_function__`` (from C++)."""
        kwargs = kwargs or {}
        dense = {}

        def materialise(shell):
            return dense.setdefault(id(shell), (shell, shell._layer.dequantize()))[1]

        plain_args, plain_kwargs = pytree.tree_map_only(VirtualWeight, materialise, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for shell in pytree.tree_leaves(given):
                    if isinstance(shell, VirtualWeight):
                        shell._layer.quantize_(dense[id(shell)][1])
                        result = shell if result is dense[id(shell)][1] else result
        return result

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), torch.nn.Parameter(self._layer.dequantize(), requires_grad=False))

    def __reduce_ex__(self, protocol):
        return torch.nn.Parameter(self._layer.dequantize(), requires_grad=False).__reduce_ex__(protocol)
