"""What layers with a weight in 4 bits or int8 share: moves, and state dicts by bitsandbytes' keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checkpoint_bnb
from ...ops import Packed4
from ..quant_state import QuantState, state_from_core
from .parameters import Int8Params, Params4bit, SelfQuantizing


class PackedLayer:
    """A mixin for modules whose ``weight`` is a `SelfQuantizing` one. Subclasses say how it looks in a state dict."""

    weight_class: type[SelfQuantizing]
    stored_keys: tuple[str, ...]  # entries that describe the weight, beside ``weight``

    def read_packed(self, entries: dict[str, Tensor], name: str) -> tuple:
        """What the weight's ``set_packed`` takes, from those entries. ValueError if they are damaged."""
        raise NotImplementedError

    @property
    def is_packed(self) -> bool:
        """Whether the weight is, be it a `SelfQuantizing` one or what FSDP made of it."""
        raise NotImplementedError

    def move_scales(self) -> None:
        """To where the packed bytes are."""
        raise NotImplementedError

    def restore_weight(self) -> None:
        """Make a packed weight that others have made a plain Parameter a `SelfQuantizing` one again."""
        raise NotImplementedError

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.restore_weight()  # bitsandbytes' pickles lose its class

    def _apply(self, fn, recurse=True):
        """A move applies to packed bytes and their scales, a cast to neither."""
        weight, packed = self._parameters.get("weight"), self.is_packed  # none there: FSDP shows a view of its own

        def moved_not_cast(tensor):
            result = fn(tensor)
            if tensor is not weight:
                return result
            if packed and result.dtype != tensor.dtype:
                result = tensor.to(result.device)
            return result.detach()

        super()._apply(moved_not_cast, recurse)
        if isinstance(weight, SelfQuantizing) and self.weight is not weight:  # to meta and back torch makes a plain one
            self._parameters["weight"] = weight.like(self.weight.data)
        self.move_scales()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Packed entries make the layer a quantised one; a float weight is quantised if the layer is."""
        entries = {key: state_dict[prefix + key] for key in ("weight", *self.stored_keys) if prefix + key in state_dict}
        rest = dict(state_dict)
        plain = "weight" not in entries or (is_float(entries["weight"]) and not self.is_packed)
        if entries.keys() & set(self.stored_keys) or not plain:
            name = prefix[:-1] or type(self).__name__
            try:
                self.fill(entries, name, local_metadata.get("assign_to_params_buffers", False))
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
            for key in entries:
                del rest[prefix + key]
            rest[prefix + "weight"] = self.weight  # as it is now: not missing
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def fill(self, entries: dict, name: str, assign: bool) -> None:
        """assign: use these tensors, where they are, as load_state_dict(assign=True) does; otherwise copies."""
        for key, value in entries.items():
            if not isinstance(value, (Tensor, str) if key == "weight_format" else Tensor):
                raise TypeError(f"{name}: {key} is a {type(value).__name__}, wanted a tensor")
        self.restore_weight()
        weight, shape = self.weight, self.weight_shape()
        theirs = next((value.device for value in entries.values() if isinstance(value, Tensor)), weight.device)
        device = theirs if assign or weight.is_meta else weight.device
        entries = {
            key: value.detach().to(device, copy=not assign) if isinstance(value, Tensor) else value
            for key, value in entries.items()
        }
        if entries.keys() != {"weight"}:
            packed = self.read_packed(entries, name)
        elif is_float(entries["weight"]) and entries["weight"].shape == shape:
            packed = weight.pack(entries["weight"])
        else:
            raise ValueError(
                f"{name}.weight is {checkpoint_bnb.describe(entries['weight'])} without {self.stored_keys[0]}; wanted "
                f"a float weight of shape {list(shape)}, or all entries of a quantised one"
            )
        if weight.is_meta or not isinstance(weight, SelfQuantizing):
            weight = self.weight = self.weight_class(module=self)
        weight.set_packed(*packed)

    def weight_shape(self) -> tuple[int, int]:
        if isinstance(self, torch.nn.Embedding):
            return self.num_embeddings, self.embedding_dim
        return self.out_features, self.in_features

    def not_quantized(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}{self.weight_shape()}: the weight is not quantised yet; move the layer to a device "
            'first, .to("cpu") or .to("cuda")'
        )


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Layer4bit(PackedLayer):
    weight_class = Params4bit
    stored_keys = checkpoint_bnb.BNB4_KEYS[1:]
    quant_state: QuantState | None = None

    def weight_state(self) -> QuantState | None:
        """None for a float weight. FSDP and others make plain tensors of weights; then the layer has the state."""
        weight = self.weight
        if isinstance(weight, Params4bit) and not weight.is_packed:
            return None
        state = getattr(weight, "quant_state", None)
        return self.quant_state if state is None else state

    @property
    def is_packed(self):
        return self.weight_state() is not None

    def move_scales(self):
        if self.is_packed and not self.weight.is_meta:
            self.weight_state().to(self.weight.device)

    def restore_weight(self):
        state = self.weight_state()
        if state is not None and (not isinstance(self.weight, Params4bit) or self.weight.quant_state is None):
            weight = Params4bit(module=self)
            weight.set_packed(self.weight.data, state)
            self.weight = weight

    def packed_weight(self) -> tuple[Tensor, QuantState]:
        state = self.weight_state()
        if state is None:
            raise self.not_quantized()
        return self.weight.data, state

    def read_packed(self, entries, name):
        native, settings = checkpoint_bnb.native_from_bnb4(entries, name, self.weight_shape())
        weight = Packed4(**native)
        dtype = settings["dtype"] or torch.float32
        state = state_from_core(weight, settings["quant_type"], settings["blocksize"], settings["shape"], dtype)
        return entries["weight"].reshape(-1, 1), state

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.weight_state()
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()


class Layer8bit(PackedLayer):
    weight_class = Int8Params
    stored_keys = checkpoint_bnb.BNB8_KEYS[1:]

    def row_scales(self) -> Tensor | None:
        """Absmax f32 [n], or None for a float weight."""
        return getattr(self.weight, "SCB", None)

    @property
    def is_packed(self):
        return self.weight.dtype == torch.int8

    def move_scales(self):
        if isinstance(self.weight, Int8Params):
            self.weight.move_scales()

    def restore_weight(self):
        scales = self.row_scales()
        if scales is not None and not isinstance(self.weight, Int8Params):
            self.weight = Int8Params(self.weight.data, requires_grad=False, SCB=scales)

    def read_packed(self, entries, name):
        if getattr(self.weight, "has_fp16_weights", False):
            raise ValueError(f"{name}: the state dict has int8 weights, the layer trains float ones (has_fp16_weights)")
        native, _ = checkpoint_bnb.native_from_bnb8(entries, name, self.weight_shape())
        return native["qweight"], native["absmax"]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = self.row_scales()
        if scales is not None:
            native = {"qweight": self.weight.data, "absmax": scales}
            stored = checkpoint_bnb.bnb8_from_native(native)
            for key in self.stored_keys:
                destination[prefix + key] = stored[key] if keep_vars else stored[key].detach()
