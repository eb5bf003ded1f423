"""Tiny mixture-of-experts models, one of each layout of experts that Transformers has."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from bnbq.experts import QuantizedExperts  # noqa: E402
from hf import AUTO  # noqa: E402

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
LAYOUTS = {
    # w1, w2, w3 of each expert in the file, and another name for the block
    "mixtral": lambda t: t.MixtralConfig(**SMALL, intermediate_size=128, num_local_experts=4),
    # gate, up and down of each expert in the file
    "qwen3_moe": lambda t: t.Qwen3MoeConfig(
        **SMALL, intermediate_size=128, moe_intermediate_size=64, head_dim=16, num_experts=8, num_experts_per_tok=2
    ),
    # transposed, gate and up interleaved, biases, an activation of its own; k = 96 is no multiple of the blocksize
    "gpt_oss": lambda t: t.GptOssConfig(
        **SMALL, intermediate_size=96, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    # grouped routing, shared experts, a dense first layer
    "deepseek_v3": lambda t: t.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    # whole experts in the file, under the names of linear layers
    "granitemoe": lambda t: t.GraniteMoeConfig(
        **SMALL, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2
    ),
    # no gate
    "nemotron_h": lambda t: t.NemotronHConfig(
        **SMALL,
        intermediate_size=64,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layers_block_type=["moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        moe_shared_expert_intermediate_size=64,
        head_dim=16,
    ),
}
SETTINGS = {"nf4": {"bits": 4}, "int4 double": {"bits": 4, "quant_type": "int4", "double_quant": True}, "int8": {"bits": 8}}


def build(name, folder):
    torch.manual_seed(7)
    model = AUTO.from_config(LAYOUTS[name](transformers)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] <= 8:  # a router or biases: not all alike, not all zero
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder, AUTO.from_pretrained(folder)


def packed_experts(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}


def linear(weight, bias=None):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone())
    layer.bias = None if bias is None else torch.nn.Parameter(bias.clone())
    return layer
