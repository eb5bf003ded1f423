"""PEFT: LoRA on quantised experts, through PEFT's own mechanism for layers that it does not know.

PEFT adapts a float expert weight by ``target_parameters``, which adds the adapter to all of it in every forward. A
packed weight is no Parameter that PEFT could find, and adding to it would mean dequantising it. `LoraExperts` wraps a
model's experts module instead and adds each adapter's product to the packed one, for the rows of the experts that are
routed to; `bnbq.lora_config` (experts.py) makes a LoraConfig use it.
"""

from __future__ import annotations

import math

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..experts import projections
from .experts import check_lora, experts_forward, project


class LoraExperts(nn.Module, LoraLayer):
    """A model's experts module with adapters on both projections.

    Of each adapter and projection: A [r * experts, in] and B [out, r * experts], in PEFT's order for experts. Those
    into the hidden layer are ``lora_A`` and ``lora_B``, those out of it ``lora_down_A`` and ``lora_down_B``.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_down_A", "lora_down_B")

    def __init__(self, base_layer, adapter_name: str, config, r: int = 0, lora_alpha: int = 1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_down_A, self.lora_down_B = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module):
        first = getattr(module, projections(module)[0])
        return first.in_features, first.out_features

    def pairs(self) -> dict[str, tuple[nn.ModuleDict, nn.ModuleDict]]:
        """Projection -> its A and B by adapter."""
        first, second = projections(self.get_base_layer())
        return {first: (self.lora_A, self.lora_B), second: (self.lora_down_A, self.lora_down_B)}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        """Add an adapter."""
        if r <= 0:
            raise ValueError(f"LoraExperts: r is {r}, expected at least 1")
        check_lora(config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        for name, (a, b) in self.pairs().items():
            packed = getattr(self.get_base_layer(), name)
            rank, device = r * packed.num_experts, packed.qweight.device
            device = torch.device("cpu") if device.type == "meta" else device  # offloaded: adapters are not
            a[adapter_name] = nn.Linear(packed.in_features, rank, bias=False, device=device)
            b[adapter_name] = nn.Linear(rank, packed.out_features, bias=False, device=device)
            if config.init_lora_weights:
                nn.init.kaiming_uniform_(a[adapter_name].weight, a=math.sqrt(5))
                nn.init.zeros_(b[adapter_name].weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, name: str, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [experts, r, in] and B [experts, out, r] of a projection."""
        a, b = (pair[adapter].weight for pair in self.pairs()[name])
        r = self.r[adapter]
        return a.view(-1, r, a.shape[1]), b.view(b.shape[0], r, -1).permute(2, 0, 1)

    def project(self, module: nn.Module, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The packed product and every active adapter's, row by row."""
        y = project(module, name, x, ends)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            (a, b), scaling = self.factors(name, adapter), self.scaling[adapter]
            low = self.lora_dropout[adapter](x.to(a.dtype))
            parts, start = [], 0
            for expert, stop in enumerate(ends.tolist()):
                if stop > start:
                    parts.append(low[start:stop] @ a[expert].T @ b[expert].T * scaling)
                start = stop
            parts.append(low.new_zeros(len(x) - start, y.shape[1]))
            y = y + torch.cat(parts).to(y.dtype)
        return y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.disable_adapters and self.merged:
            self.unmerge()
        base, inputs = self.base_layer, (hidden_states, top_k_index, top_k_weights)
        if self.disable_adapters or self.merged:
            return base(*inputs)
        hook = getattr(base, "_hf_hook", None)
        if hook is None:
            return experts_forward(base, *inputs, self.project)
        # Accelerate's hook acts around the module's own forward; what it brings for one is needed here (biases).
        inputs, _ = hook.pre_forward(base, *inputs)
        return hook.post_forward(base, experts_forward(base, *inputs, self.project))

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, name: str, adapter: str) -> torch.Tensor:
        """What an adapter adds to a projection, float32 in the layout of its weight."""
        a, b = self.factors(name, adapter)
        delta = (b.float() @ a.float()) * self.scaling[adapter]
        return delta.mT if getattr(self.get_base_layer(), name).transposed else delta

    def expert_delta(self, name: str, adapter: str, number: int) -> torch.Tensor:
        """What an adapter adds to one expert of a projection, float32[n, k]."""
        a, b = self.factors(name, adapter)
        return (b[number].float() @ a[number].float()) * self.scaling[adapter]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names=None) -> None:
        """Requantise the weights with the adapters added; ``safe_merge`` needs nothing more: bad values are refused."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                self.add(adapter, 1)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            self.add(self.merged_adapters.pop(), -1)

    def add(self, adapter: str, sign: int) -> None:
        for name in self.pairs():
            packed = getattr(self.get_base_layer(), name)
            packed.quantize_(packed.dequantize(torch.float32) + sign * self.get_delta_weight(name, adapter))

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names):
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.get_base_layer()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
