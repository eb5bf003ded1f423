"""Transformers: the registered config and quantiser, and `from_pretrained` in bitsandbytes' keyword style.

The quantiser swaps linear layers for quantised ones on the meta device before the weights come, and says how
each tensor gets from the file into them (conversions.py). A checkpoint that is quantised already is described
by its files (stored.py), whether bnbq or bitsandbytes wrote it. Where "cpu" and "disk" appear in a device map
the layers there are quantised like all others.
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import checkpoint, experts, nn, placement
from .. import config as settings
from ..checkpoint import PACKED_NAMES
from ..matrix import PackedMatrix
from ..packed import PackedModule, protect_scales, state_dict_to_save
from ..side_branch import SideBranch
from ..state import BITS
from . import register
from .float_layers import float_layer, original_kinds
from .model_card import UploadWithCard, card_beside_the_files
from .order import put_floats_first
from .parallel import parameters_may_be_cast, refuse_split
from .ties import name_ties, untie_rest

logger = logging.get_logger(__name__)


class BnbqConfig(settings.BnbqConfig, QuantizationConfigMixin):
    """`bnbq.config.BnbqConfig` as Transformers takes it: the ``quantization_config`` of ``from_pretrained``."""

    def get(self, key, default=None):
        """Transformers asks a config that was loaded before as if it were a dict."""
        return self.to_native_dict().get(key, default)

    def to_diff_dict(self) -> dict:
        return self.to_dict()


class BnbqQuantizer(HfQuantizer):
    """Quantises while loading, loads what bnbq or bitsandbytes saved, and saves either."""

    requires_calibration = False

    def __init__(self, quantization_config, **kwargs):
        # A copy: saving for bitsandbytes writes into it, and the caller may use the same settings again.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.names: set[str] = set()  # of the quantised layers, those that hold experts included
        self.rules: set[str] = set()  # of those that quantising afresh would choose
        self.originals: dict = {}  # name -> the float layer or Parameter on meta, while loading
        self.tied: dict = {}  # name of a quantised layer -> the one whose weight it has, while loading
        self.device_map: dict | None = None
        self.checkpoint_files: list = []
        self.stored = None  # StoredCheckpoint, while loading a quantised one
        self.prefix = ""
        self.notes: dict[str, list] = {}  # what was odd about the checkpoint -> the layers

    # ------------------------------------------------------------------ what Transformers asks

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: the quantised weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        """Called with the device map as given, and again when "auto" has become one: a GPU needs a build with CUDA."""
        if not hasattr(HfQuantizer, "update_weight_conversions"):
            import transformers

            raise ImportError(f"bnbq needs transformers 5.23 or later; {transformers.__version__} is installed")
        self.device_map = device_map if isinstance(device_map, dict) else None
        for device in (self.device_map or {}).values():
            if placement.as_device(device) != "disk":
                placement.check_device_is_there(placement.as_device(device))

    def update_device_map(self, device_map):
        """None is the current GPU, if there is one that bnbq can use, as with bitsandbytes; the CPU otherwise. A dict
        comes back as a copy, for `flatten_device_map`."""
        if device_map is None and torch.cuda.is_available() and placement.has_cuda_build():
            device_map = {"": torch.cuda.current_device()}
            logger.info(f"bnbq: no device_map was given; using {device_map}")
        return dict(device_map) if isinstance(device_map, dict) else device_map

    def adjust_max_memory(self, max_memory):
        """A tenth is left for what quantising and running need."""
        return {key: value * 0.90 for key, value in max_memory.items()}

    def param_element_size(self, model, param_name, param) -> float:
        """Exact: the layers on meta have their packed shapes."""
        return param.element_size()

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        """For the float weight on its way to ``qweight``: it must not be cast to that parameter's dtype first."""
        module, _, leaf = param_name.rpartition(".")
        return not self.pre_quantized and leaf in PACKED_NAMES and module in self.names

    def get_quantize_ops(self):
        """Quantising is done by the converters; nothing is left to do after them."""
        from .conversions import Keep

        return Keep()

    def get_new_dtype(self, converter, param, dtype):
        """bitsandbytes' tensors are read as they are; its scales are not cast to the model's dtype."""
        from .conversions import ReadBitsandbytes

        if isinstance(converter, ReadBitsandbytes):
            converter.see(param)
            return None
        return super().get_new_dtype(converter, param, dtype)

    # ------------------------------------------------------------------ before the weights

    def _process_model_before_weight_loading(self, model, device_map=None, checkpoint_files=None, **kwargs):
        from .. import selection
        from .stored import pickled_settings

        refuse_split(model)
        self.flatten_device_map(model, device_map)
        self.prefix = getattr(model, "base_model_prefix", "") or ""
        self.checkpoint_files = [str(f) for f in checkpoint_files or [] if str(f).endswith(".safetensors")]
        self.rules = set(selection.select_modules(model, self.quantization_config, strict=not self.pre_quantized))
        # Of a quantised checkpoint the files decide; how their names map to the model's is known a step later.
        if not (self.pre_quantized and self.checkpoint_files):
            if self.pre_quantized:
                self.adopt_format(pickled_settings(checkpoint_files or []))
            self.swap(model, dict.fromkeys(self.rules, self.quantization_config))
            self.warn_if_nothing(model)
        return model

    def flatten_device_map(self, model, device_map) -> None:
        """Entries inside others, which Accelerate's hooks cannot have, are resolved in Transformers' own dict, made by
        `update_device_map`: it asks quantisers for changes before there is a model, and then no more."""
        if isinstance(device_map, dict):
            flat = placement.flatten(model, device_map)
            device_map.clear()
            device_map.update(flat)
            self.device_map = device_map

    def warn_if_nothing(self, model) -> None:
        if not self.names:
            logger.warning(f"bnbq: {type(model).__name__} has no linear layer to quantise")

    def plan_from_files(self, model, conversions) -> None:
        """Quantised layers where the files have them, in the format that the files have."""
        from .. import selection
        from .conversions import file_renaming
        from .stored import StoredCheckpoint

        layers = {
            name: module
            for name, module in model.named_modules()
            if selection.is_linear(module) or isinstance(module, torch.nn.Embedding)
        }
        tied = selection.tied_names(model, layers)
        self.stored = StoredCheckpoint(self.checkpoint_files, file_renaming(model, conversions))
        self.stored.check_strangers(model)
        chosen = self.stored.choose({**layers, **experts.find(model)}, self.rules - tied.keys())
        described = self.stored.bnb_settings(
            [name for name, layer in chosen.items() if not layer.native and layer.bits == 4]
        )
        self.adopt_format(described)
        configs = {name: self.layer_config(layer, described.get(name)) for name, layer in chosen.items()}
        for name, source in tied.items():  # the files have one of those that are tied
            config = configs.get(name) or configs.get(source)
            if config is not None:
                configs |= {other: config for other in (name, source) if other not in self.stored.layers}
        self.swap(model, configs)
        for name, layer in chosen.items():
            layer.attach_branch(model.get_submodule(name))
            self.stored.check_layer(name, model.get_submodule(name))
        self.warn_if_nothing(model)

    def adopt_format(self, described: dict) -> None:
        """Let the settings, which a save in our format writes, say what bitsandbytes' files have: its config has no
        block size, an old one no type either, and its double quantisation may be of a kind that is decoded here.
        Layers that differ from the first are for `check_one_format`."""
        if self.quantization_config.bits == 4:
            for first in list(described.values())[:1]:
                for key in ("quant_type", "blocksize", "double_quant"):
                    setattr(self.quantization_config, key, first[key])

    def layer_config(self, layer, described: dict | None):
        """The config for one stored layer: the model's, or what bitsandbytes says about this layer."""
        config = self.quantization_config
        if layer.native or (layer.bits == 8 and config.bits == 8):
            return config
        if layer.bits == 8:
            return BnbqConfig(bits=8, threshold=config.threshold)
        return BnbqConfig(
            bits=4,
            quant_type=described["quant_type"],
            blocksize=described["blocksize"],
            double_quant=described["double_quant"],
            compute_dtype=config.compute_dtype,
            activations=config.activations,
        )

    def swap(self, model, configs: dict) -> None:
        """Put unfilled quantised layers where the float layers of these names are."""
        from .. import replace, selection

        self.tied = selection.tied_names(model, configs)
        layers = {}
        for name, config in configs.items():
            module = experts.float_part(model, name)
            layer = replace.make_layer(module, config, device="meta")
            if isinstance(module, experts.ExpertWeight):
                self.originals[name] = module.weight
                replace.put(model, name, layer)
            else:
                self.originals[name], layers[module] = module, layer
                layer.source_cls = type(module)  # Conv1D stores it transposed, and is what dequantising restores
                # A buffer of an embedding that no file has (a scale) is for the model's own initialisation.
                layer._is_hf_initialized = not layer._buffers
        self.put(model, layers)
        self.names.update(configs)
        name_ties(model)

    @staticmethod
    def put(model, modules: dict) -> None:
        """Replace modules (old -> new) under every name that each has in the model."""
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in modules:
                model.set_submodule(name, modules[module])

    def undo(self, model, name: str, original) -> None:
        """Put a float layer, or a float Parameter of experts, back where a quantised one is."""
        from .. import replace

        if isinstance(original, torch.nn.Parameter):
            replace.put(model, name, original)
        else:
            self.put(model, {model.get_submodule(name): original})

    def sharing(self, name: str) -> set:
        """Names of the quantised layers that have the weight of this one, itself included; while loading."""
        source = self.tied.get(name, name)
        return {name, source, *(other for other in self.tied if self.tied[other] == source)}

    def is_on_disk(self, name: str) -> bool:
        """Does the device map send this layer to disk?"""
        from transformers.integrations.accelerate import get_device

        return self.device_map is not None and get_device(self.device_map, f"{name}.qweight") == "disk"

    def owns(self, name: str) -> bool:
        """Is ``name``, which may have the base model's prefix or lack it, one of the quantised layers?"""
        return (
            name in self.names
            or f"{self.prefix}.{name}" in self.names
            or (name.startswith(f"{self.prefix}.") and name.removeprefix(f"{self.prefix}.") in self.names)
        )

    def float_name(self, name: str) -> str:
        """The name of the float weight for that of the packed one, while loading; other names stay."""
        layer = name.removesuffix(".qweight")
        if layer == name or isinstance(self.originals.get(layer), torch.nn.Parameter):
            return layer
        return f"{layer}.weight"

    def update_weight_conversions(self, weight_conversions, model):
        """The model's own conversions, made to quantise what they make for us, and then ours."""
        from transformers.core_model_loading import WeightConverter

        from .conversions import ConvertFloat, Quantize, QuantizeConverted, ReadBitsandbytes

        if self.pre_quantized:
            if self.checkpoint_files:
                self.plan_from_files(model, weight_conversions)
            kept = [
                ConvertFloat(entry, self) if isinstance(entry, WeightConverter) else entry
                for entry in weight_conversions
            ]
            return [*kept, ReadBitsandbytes(self)]
        wrapped = [
            QuantizeConverted(entry, self) if isinstance(entry, WeightConverter) else entry
            for entry in weight_conversions
        ]
        wrapped.append(Quantize(self))
        if self.checkpoint_files:
            self.leave_new_layers(model, wrapped)
        return wrapped

    def leave_new_layers(self, model, conversions) -> None:
        """Layers whose weight no file has (a new head) stay float: Transformers initialises and reports them."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        known, coming = model.state_dict(), set()
        for key in checkpoint.read_headers(self.checkpoint_files)[0]:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            entry = by_pattern.get(pattern)
            names = entry.targets(self.float_name(name)) if hasattr(entry, "targets") else [name]
            coming.update(n.removesuffix(".qweight").removesuffix(".weight") for n in names)
        for entry in conversions:
            entry._was_used = False
        new = sorted(name for name in self.names if not coming & self.sharing(name))
        for name in new:
            logger.warning(f"bnbq: {name} stays in float: the checkpoint has no weight for it")
            self.undo(model, name, self.originals.pop(name))
        self.names.difference_update(new)
        name_ties(model)

    # ------------------------------------------------------------------ after the weights

    def _process_model_after_weight_loading(self, model, **kwargs):
        layers = {name: model.get_submodule(name) for name in sorted(self.names)}
        hooked = hasattr(model, "_hf_hook") or any(hasattr(layer, "_hf_hook") for layer in layers.values())
        in_memory = {}
        for name, layer in layers.items():
            for leaf in layer.packed_spec():
                parameter = getattr(layer, leaf)
                parameter.requires_grad_(False)
                if not hooked and not getattr(parameter, "_is_hf_initialized", False):
                    raise ValueError(
                        f"{name}.{leaf} was not in the checkpoint; its layer would compute with random weights"
                    )
                if parameter.device.type != "meta":
                    in_memory[f"{name}.{leaf}"] = parameter
        if self.stored is not None:
            checkpoint.verify_checksums(in_memory, self.stored.checksums, self.stored.where)
        for name, source in self.tied.items():
            untie_rest(model.get_submodule(name), model.get_submodule(source))
        for note, names in self.notes.items():
            warnings.warn(
                f"{names[0]}{f' and {len(names) - 1} other layers' if len(names) > 1 else ''}: {note}", stacklevel=2
            )
        self.originals, self.tied, self.checkpoint_files, self.stored, self.notes = {}, {}, [], None, {}
        self.finish(model)
        return model

    def finish(self, model) -> None:
        """What saving and pushing a quantised model need."""
        from .experts import refuse_lost_adapters

        name_ties(model)
        put_floats_first(model)
        packed = [module for module in model.modules() if isinstance(module, PackedModule)]
        if parameters_may_be_cast() and not any(layer.qweight.is_meta for layer in packed):
            protect_scales(model)
        self.keep_for_saving(model)
        hooks = model._forward_pre_hooks.values()
        if refuse_lost_adapters not in hooks and any(isinstance(layer, experts.QuantizedExperts) for layer in packed):
            model.register_forward_pre_hook(refuse_lost_adapters)
        model.add_model_tags([self.quantization_config.quant_method])
        model._upload_modified_files = UploadWithCard()

    def keep_for_saving(self, model) -> None:
        """Which conversions `save_pretrained` undoes: the model's, not ours; bitsandbytes' names if they are wanted.

        A conversion of the model that would also undo something to a quantised layer (fuse its projections again)
        is dropped: that layer and its neighbours are saved under the model's own names, which load as well.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        from .conversions import Converter, ReadBitsandbytes, WrappedConverter, reverts

        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:  # not from from_pretrained: what Transformers would take when it saves
            conversions = [
                entry
                for entry in get_model_conversion_mapping(model, add_legacy=False)
                if not isinstance(entry, PrefixChange)
            ]
        ours = [f"{name}.{leaf}" for name in self.names for leaf in ("weight", *PACKED_NAMES)]
        kept = []
        for entry in conversions:
            entry = entry.inner if isinstance(entry, WrappedConverter) else entry
            if not isinstance(entry, Converter) and not reverts(entry, ours):
                kept.append(entry)
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            if any(isinstance(module, nn.QuantizedEmbedding) for module in model.modules()):
                raise ValueError("checkpoint_format='bitsandbytes': bitsandbytes has no format for embeddings")
            kept.append(ReadBitsandbytes(self))
            self.spell_out_skips(model)
        model._weight_conversions = kept

    def spell_out_skips(self, model) -> None:
        """bitsandbytes drops its default skips once modules are named, so what it must skip is written out in full."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        from .. import selection

        linears = [
            name
            for name, module in model.named_modules()
            if selection.is_linear(module)
        ]
        default = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        if {name for name in linears if should_convert_module(name, default)} != self.names:
            self.quantization_config.skip_modules = sorted(set(linears) - self.names)

    # ------------------------------------------------------------------ saving and undoing

    def get_state_dict_and_metadata(self, model):
        """What is saved, None being the model's own state dict, and the checksums of the packed tensors."""
        from .conversions import stored

        tensors, state = {}, None
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            branched = [name for name, module in model.named_modules() if isinstance(module, SideBranch)]
            if branched:
                raise ValueError(
                    f"{branched[0]} has a side branch, for which bitsandbytes' format has no place; "
                    'save with checkpoint_format="bnbq"'
                )
        if not getattr(model, "_hf_peft_config_loaded", False):
            if self.quantization_config.checkpoint_format == "bnbq":
                check_one_format(model, self.quantization_config)
            tied = getattr(model, "all_tied_weights_keys", {})  # saved under the names of what they are tied to
            for name, module in model.named_modules():
                if isinstance(module, PackedModule):
                    for leaf, (_, dtype) in module.packed_spec().items():
                        key = f"{name}.{leaf}"
                        if key not in tied:
                            tensors[key] = stored(model, key, module._parameters[leaf].detach()).view(dtype)
            if any(parameter.dtype == BITS for parameter in model.parameters()):
                state = state_dict_to_save(model)
            card_beside_the_files(sys._getframe(1))
        metadata = {"bnbq_version": str(self.quantization_config.version)}
        return state, {
            **metadata,
            **checkpoint.checksum_metadata({k: v for k, v in tensors.items() if type(v) in PLAIN}),
        }

    def _dequantize(self, model, dtype=None):
        """Float layers of the kind there was before, in ``dtype``. Needs the packed tensors in memory."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        matrices = {name: layer for name, layer in layers.items() if isinstance(layer, PackedMatrix)}
        kinds = original_kinds(model, matrices)
        for name, layer in layers.items():
            if layer.qweight.device.type == "meta":
                raise ValueError(
                    f'{name} is offloaded; load the model without "cpu" or "disk" beside other devices to dequantise it'
                )
            self.undo(model, name, float_layer(layer, dtype, kinds.get(name)))
            self.names.discard(name)
        name_ties(model)
        model.tie_weights(recompute_mapping=False)
        model.__dict__.pop("_upload_modified_files", None)
        if model.model_tags is not None:
            model.model_tags = [tag for tag in model.model_tags if tag != self.quantization_config.quant_method]
        return model


PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_one_format(model, config) -> None:
    """bnbq's config.json describes all layers at once: ValueError for one that it would describe wrongly."""
    wanted = config.embedding_settings()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            has = module.format()
            if any(has.get(key) != value for key, value in wanted.items()):
                raise ValueError(
                    f"{name} is {module.describe()}, but the model's settings say {config.describe()}; bnbq's format "
                    'describes all layers at once: save with checkpoint_format="bitsandbytes", or bnbq.save the model'
                )


# ------------------------------------------------------------------ models quantised in memory


def attach_config(model, config) -> None:
    """Make a model that `bnbq.quantize_model` quantised save and report like one that `from_pretrained` quantised."""
    quantizer = BnbqQuantizer(BnbqConfig.from_dict(config.to_native_dict()), pre_quantized=False)
    quantizer.names = {name for name, module in model.named_modules() if isinstance(module, PackedModule)}
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    for module in model.modules():
        if hasattr(module, "config") and hasattr(type(module), "from_pretrained"):
            module.config._is_quantized = True
    quantizer.finish(model)


def from_pretrained(model_class, name_or_path, *args, quantization_config=None, **kwargs):
    """``model_class.from_pretrained`` that takes what bitsandbytes' users have.

    Args:
        model_class: an Auto class or a model class of Transformers.
        quantization_config: None, a BnbqConfig, a transformers.BitsAndBytesConfig, or the JSON of either.
        kwargs: settings by keyword (``load_in_8bit=True``, ``bnb_4bit_quant_type="nf4"``, every argument of
            BnbqConfig), and whatever ``from_pretrained`` takes.

    A float checkpoint is quantised while it loads; without any settings it is loaded as it is. A quantised one,
    written by bnbq or by bitsandbytes, is loaded bit for bit: of the settings only compute_dtype, activations,
    threshold, checkpoint_format and the bits (which must agree) matter then. Nothing global changes: bitsandbytes' own
    checkpoints keep loading with bitsandbytes elsewhere in the process.
    """
    from .loading import load

    return load(model_class, name_or_path, args, quantization_config, kwargs)


register()  # what imported us has done it already, unless we were imported first
