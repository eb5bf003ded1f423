"""Transformers' experts interface: how a model's own experts module computes with packed weights.

Models decorate their experts with `transformers.integrations.moe.use_experts_implementation`, which looks the forward
up by the name in the module's config. Ours is "bnbq": it sorts the tokens by expert and multiplies with the packed
projections (experts.py); gates, activations, norms and biases are the module's, so every layout that the decorator
describes works. The arithmetic after the products is that of Transformers' "grouped_mm".
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..experts import QuantizedExperts, is_experts, projections

IMPLEMENTATION = "bnbq"


def activate(module: torch.nn.Module) -> None:
    """Let an experts module, and those that share its config, compute through `experts_forward`."""
    module.config._experts_implementation = IMPLEMENTATION


def project(module: torch.nn.Module, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row of x times its expert's matrix, packed or (a projection that is skipped) float, plus its bias."""
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    if isinstance(weight, torch.nn.Module):
        return weight(x, ends, bias)
    parts, start = [], 0
    for expert, stop in enumerate(ends.tolist()):
        matrix = weight[expert].T if module.is_transposed else weight[expert]
        if stop > start:
            parts.append(functional.linear(x[start:stop], matrix, None if bias is None else bias[expert]))
        start = stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[2 if module.is_transposed else 1])])


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    project=project,
) -> torch.Tensor:
    """Sum over each token's experts of weight * expert(token).

    Args:
        self: the model's experts module.
        hidden_states: float[tokens, hidden].
        top_k_index: int[tokens, k], the experts of each token; num_experts or more is none.
        top_k_weights: float[tokens, k].
        project: what multiplies; adapters put their own in the place of this file's.

    Modules whose weights are all float (skipped, or dequantised) compute as Transformers' default does.
    """
    first, second = projections(self)
    if first not in self._modules and second not in self._modules:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
    x = project(self, first, hidden_states[order // k], ends)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = project(self, second, x, ends)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # No index_add_: its order is not fixed everywhere, and it would add in the narrow dtype.
    x = torch.empty_like(x).index_copy(0, order, x)
    return x.view(tokens, k, x.shape[-1]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


# ------------------------------------------------------------------ PEFT


def quantized_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's experts modules whose projections are all packed, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) and all(isinstance(module._modules.get(p), QuantizedExperts) for p in projections(module))
    }


def lora_config(model: torch.nn.Module, config):
    """Let a LoraConfig adapt the quantised experts of ``model`` too; returns it.

    ``config.target_parameters`` that name expert weights ("experts.gate_up_proj") become the experts module in
    ``config.target_modules`` ("mlp.experts"), which may also be named there at once; both of its projections are
    adapted then. Call it again on the config of a saved adapter: the class is not stored::

        config = bnbq.lora_config(model, PeftConfig.from_pretrained(path))
        model = PeftModel.from_pretrained(model, path, config=config)

    Raises ValueError for a model without quantised experts and for settings that have no meaning here (DoRA, biases).
    """
    from .experts_lora import LoraExperts

    modules = quantized_experts(model)
    if not modules:
        raise ValueError(f"lora_config: {type(model).__name__} has no quantised experts; PEFT needs no help then")
    check_lora(config)
    weights = {f"{name}.{leaf}": name for name, module in modules.items() for leaf in projections(module)}
    targets, left = config.target_modules or set(), []
    for parameter in config.target_parameters or ():
        owners = {".".join(o.split(".")[-2:]) for w, o in weights.items() if f".{w}".endswith(f".{parameter}")}
        if not owners:
            left.append(parameter)
        elif isinstance(targets, str):
            raise ValueError(
                f"lora_config: target_modules is the pattern {targets!r}; name {', '.join(sorted(owners))} in it, or "
                f"give a list, instead of target_parameters={parameter!r}"
            )
        else:
            targets = {*targets, *owners}
    config.target_modules, config.target_parameters = targets, left or None
    config._register_custom_module({type(module): LoraExperts for module in modules.values()})
    return config


def check_lora(config) -> None:
    for name in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, name, False):
            raise ValueError(f"lora_config: {name} has no meaning for experts")
    if config.init_lora_weights not in (True, False):
        raise ValueError(f"lora_config: init_lora_weights is {config.init_lora_weights!r}; experts take True or False")


def refuse_lost_adapters(model: torch.nn.Module, inputs) -> None:
    """Forward pre-hook of models with packed experts: PEFT finds no packed weight by ``target_parameters``, and where
    it adapts anything else it says so in a mere warning, or (with "all-linear") not at all."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        for parameter in getattr(config, "target_parameters", None) or ():
            for name, module in model.named_modules():
                if isinstance(module, QuantizedExperts) and f".{name}".endswith(f".{parameter}"):
                    if ".base_layer." not in name:
                        raise ValueError(
                            f"target_parameters: {parameter!r} names quantised experts ({name}), which PEFT does not "
                            "find by itself: they have no adapter. Pass the config through bnbq.lora_config(model, "
                            "config) with 'mlp.experts' (or what it is called) in a list of target_modules; or name "
                            "only other modules; or keep the experts in float with skip_modules=['experts']"
                        )
