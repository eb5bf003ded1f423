"""How the tensors of a file become the parameters of a Transformers model, by Transformers' own rules.

For loaders of ours that read a checkpoint tensor by tensor; `from_pretrained` applies the same rules itself.
"""

from __future__ import annotations

import copy

import torch


class Names:
    """Which parameter of the model a tensor of the file becomes. Files of other models than Transformers' have the
    parameters' own names."""

    def __init__(self, model):
        self.model, self.prefix = model, getattr(model, "base_model_prefix", "") or None
        self.known = dict.fromkeys(model.state_dict(), True)
        self.rename, self.renamings, self.converters = None, [], []
        if not hasattr(model, "base_model_prefix"):
            return
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping

            rules = get_model_conversion_mapping(model)
            self.renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
            self.converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
            self.rename = loading.rename_source_key
        except ImportError:  # Transformers 4 renames by prefix only
            pass

    def find(self, key: str, known: dict | None = None) -> tuple[str, str | None]:
        """(name of the parameter, the pattern of the conversion between file and parameter if there is one)."""
        known = known or self.known
        if self.rename is not None:
            name, pattern = self.rename(key, self.renamings, self.converters, self.prefix, known)
            if name in known or key not in known:
                return name, pattern
        if key in known or not self.prefix:
            return key, None
        stripped = key.removeprefix(f"{self.prefix}.")
        return (stripped if stripped in known else f"{self.prefix}.{key}"), None

    def file_name(self, name: str, key: str) -> str:
        """What a new tensor ``name`` is called in a file where ``key`` belongs to the same module."""
        for renaming in reversed(self.renamings):
            if renaming.rename_source_key(key)[1] is not None:
                name = renaming.reverse_transform().rename_source_key(name)[0]
        return name

    def convert(self, name: str, parts: list) -> dict[str, torch.Tensor]:
        """Parameters of the model by name, made of the tensors of which `find` says that they become ``name``.

        ``parts`` holds (key, pattern of the conversion, function that reads the tensor) of each, in any order.
        """
        _, pattern, read = parts[0]
        if pattern is None:
            return {name: read()}
        from transformers.core_model_loading import dot_natural_key

        from .conversions import FloatShapes

        converter = copy.deepcopy(next(rule for rule in self.converters if pattern in rule.source_patterns))
        for key, pattern, read in sorted(parts, key=lambda part: dot_natural_key(part[0])):
            converter.add_tensor(name, key, pattern, read)
        made = converter.convert(name, model=FloatShapes(self.model), config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
