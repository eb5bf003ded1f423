"""Tiny random models and a tokenizer, written to a directory: what the tests of the command line read."""

import json

import torch
import transformers


def llama(folder, *, dtype=torch.bfloat16, seed=0, shard=None, tokenizer=True, **changes):
    """A two-layer Llama of about 0.2 M parameters; ``shard`` is save_pretrained's max_shard_size."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).to(dtype)
    return save(model, folder, shard, tokenizer)


def gpt2(folder, dtype=torch.float32):
    """Conv1D layers, whose weights are stored transposed."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=259, n_positions=64)
    return save(transformers.GPT2LMHeadModel(config).to(dtype), folder)


def bert(folder, dtype=torch.float32):
    """An encoder with biases everywhere."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=259
    )
    return save(transformers.BertForMaskedLM(config).to(dtype), folder)


def mixture(folder, dtype=torch.bfloat16):
    """Experts: one tensor each in the file, one for all in the model."""
    torch.manual_seed(3)
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=259,
    )
    return save(transformers.Qwen3MoeForCausalLM(config).to(dtype), folder)


def save(model, folder, shard=None, tokenizer=False):
    extra = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(folder, **extra)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer():
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def edit_config(folder, **changes):
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config))
