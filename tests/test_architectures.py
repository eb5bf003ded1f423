"""Model families beside Llama: encoders, speech, images, tied, fused, renamed, composite; each quantises, saves, loads."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors.torch import save_file  # noqa: E402

import bnbq  # noqa: E402
import small_models  # noqa: E402
from hf import AUTO, IDS, assert_same, compared, file_tensors, layers, logits, quantized  # noqa: E402

NF4 = {"bits": 4}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("models") / "llama", shard="90KB")


def build(config_class, model_class, folder, dtype=torch.float32, **settings):
    torch.manual_seed(3)
    model = model_class(config_class(**settings)).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def close(one, other, bound):
    return (one - other).norm() / other.norm() < bound


def test_t5_and_bert(tmp_path):
    t5 = build(
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        tmp_path / "t5",
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "t5", quantization_config=bnbq.BnbqConfig(load_in_8bit=True)
    )
    assert len(layers(model)) > 10 and not any("lm_head" in name for name in layers(model))
    assert close(model(IDS, decoder_input_ids=IDS).logits, t5(IDS, decoder_input_ids=IDS).logits, 0.05)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] <= 5
    model.save_pretrained(tmp_path / "t5q")
    assert_same(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5q"), model)

    small_models.bert(tmp_path / "bert")
    dense = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert", quantization_config=bnbq.BnbqConfig())
    assert (
        close(logits(model), logits(dense), 0.3) and model.bert.encoder.layer[0].attention.self.query.bias is not None
    )
    model.save_pretrained(tmp_path / "bertq")
    assert_same(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bertq"), model)


def test_new_heads_stay_float_and_are_initialised(tmp_path):
    """A layer that the checkpoint does not have is no reason to refuse it, on the fly or quantised already."""
    small_models.bert(tmp_path / "bert")
    config = bnbq.BnbqConfig(load_in_8bit=True)
    body = transformers.AutoModel.from_pretrained(
        tmp_path / "bert", quantization_config=config
    )  # the MLM model has no pooler
    assert type(body.pooler.dense) is torch.nn.Linear and body.pooler.dense.weight.std() > 0
    masked = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert", quantization_config=config)
    masked.save_pretrained(tmp_path / "packed")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert type(again.pooler.dense) is torch.nn.Linear and "pooler.dense.weight" in info["missing_keys"]
    name = "encoder.layer.1.output.dense"
    assert torch.equal(again.get_submodule(name).qweight, masked.bert.get_submodule(name).qweight)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", num_labels=3)
    assert type(classifier.classifier) is torch.nn.Linear and classifier.classifier.weight.shape == (3, 64)


def test_renamed_and_fused_checkpoints(tmp_path):
    """A model whose checkpoints fuse projections and rename layers: packed, saved, and float tensors are not lost."""
    accelerate = pytest.importorskip("accelerate")
    config = transformers.AutoConfig.for_model(
        "hrm_text",
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=64,
        num_layers_per_stack=1,
        num_hidden_layers=2,
    )
    torch.manual_seed(0)
    dense = AUTO.from_config(config).eval()
    dense.save_pretrained(tmp_path / "float")
    stored = file_tensors(tmp_path / "float")
    assert any("gate_up_proj" in name for name in stored), list(stored)[:20]
    dense = AUTO.from_pretrained(tmp_path / "float")
    for settings in (
        dict(bits=4),
        dict(bits=8, skip_modules=["gate_proj"]),
        dict(bits=4, checkpoint_format="bitsandbytes"),
    ):
        model, info = quantized(tmp_path / "float", settings, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert len(layers(model)) >= 6
        for name, layer in layers(model).items():
            wanted = type(layer).from_linear(dense.get_submodule(name))
            assert torch.equal(layer.qweight, wanted.qweight), name
        for name, parameter in model.named_parameters():
            if name in dict(dense.named_parameters()):
                assert torch.equal(parameter, dense.get_parameter(name)), name
        model.save_pretrained(tmp_path / "packed")
        again = bnbq.from_pretrained(AUTO, tmp_path / "packed")
        assert_same(again, model)
        again.save_pretrained(tmp_path / "again")
        assert_same(bnbq.from_pretrained(AUTO, tmp_path / "again"), model)
        for folder in ("float", "packed")[: 1 if "checkpoint_format" in settings else 2]:
            with accelerate.init_empty_weights():
                empty = AUTO.from_config(config).eval()
            assert_same(bnbq.load_and_quantize(empty, bnbq.BnbqConfig(**settings), tmp_path / folder), model)


def test_renamed_keys_of_layers_that_stay_float(llama, tmp_path):
    """key_mapping renames every key: a converter that caught all weights would lose embeddings and norms."""
    tensors = {f"old.{name}": tensor for name, tensor in file_tensors(llama).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    model, info = quantized(tmp_path, NF4, key_mapping={r"^old\.": ""}, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model, quantized(llama, NF4))
    model.save_pretrained(tmp_path / "packed")
    assert any(name.startswith("old.") and name.endswith(".qweight") for name in file_tensors(tmp_path / "packed"))
    assert_same(AUTO.from_pretrained(tmp_path / "packed", key_mapping={r"^old\.": ""}), model)


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_head(tmp_path, bits):
    small_models.llama(tmp_path / "float", tie_word_embeddings=True)
    model = quantized(tmp_path / "float", dict(bits=bits))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "packed")
    assert "lm_head.weight" not in file_tensors(tmp_path / "packed")
    again = AUTO.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_odd_sizes(tmp_path):
    """K % blocksize != 0: flat tensors, the same in both formats."""
    small_models.llama(tmp_path / "float", hidden_size=72, intermediate_size=100, num_attention_heads=4, head_dim=18)
    for settings in (dict(bits=4), dict(bits=4, double_quant=True), dict(bits=8)):
        model = quantized(tmp_path / "float", settings)
        for layout in ("bnbq", "bitsandbytes"):
            model.config.quantization_config.checkpoint_format = layout
            model.hf_quantizer.keep_for_saving(model)
            model.save_pretrained(tmp_path / layout)
            assert_same(bnbq.from_pretrained(AUTO, tmp_path / layout), model)


@pytest.mark.parametrize("layout", ["bnbq", "bitsandbytes"])
def test_composite_model_with_renamed_keys(tmp_path, monkeypatch, layout):
    """A vision-language model, whose files have other names than the model: converted, saved, verified under both."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)
    build(
        transformers.LlavaConfig,
        transformers.LlavaForConditionalGeneration,
        tmp_path / "float",
        vision_config=vision,
        text_config=text,
        image_token_index=63,
    )
    counts = compared(monkeypatch)
    config = bnbq.BnbqConfig(double_quant=True, checkpoint_format=layout)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "float", quantization_config=config, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(layers(model)) > 13
    assert any(".qweight" in name and name not in file_tensors(tmp_path / "float") for name in model.state_dict())
    for turn in range(2):
        model.save_pretrained(tmp_path / str(turn))
        again, info = bnbq.from_pretrained(
            transformers.AutoModelForImageTextToText, tmp_path / str(turn), output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same(again, model)
        model = again
    assert counts == [4 * len(layers(model))] * 2
    assert (
        not set(model.state_dict())
        & set(file_tensors(tmp_path / "1"))
        & {name for name in model.state_dict() if ".qweight" in name}
    )


@pytest.mark.parametrize("layout", ["bnbq", "bitsandbytes"])
def test_mixture_of_experts(tmp_path, layout):
    """Experts are 3-D parameters, fused from the file's. bitsandbytes' format has none: there they stay float and are
    written back as they were."""
    build(
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        tmp_path / "float",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
    )
    model = quantized(tmp_path / "float", dict(bits=4, checkpoint_format=layout))
    assert len(layers(model)) == 4
    model.save_pretrained(tmp_path / "packed")
    float_names = {name for name in file_tensors(tmp_path / "float") if "expert" in name}
    packed_names = {name for name in file_tensors(tmp_path / "packed") if "expert" in name}
    assert len(float_names) == 12 and (packed_names == float_names) == (layout == "bitsandbytes")
    again, info = bnbq.from_pretrained(AUTO, tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)


class Shared(transformers.PreTrainedModel):
    """A linear layer under two names."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(64, 64)
        self.again = self.first
        self.last = torch.nn.Linear(64, 2)
        self.post_init()

    def forward(self, x):
        return self.last(self.again(self.first(x).relu()))


def test_one_layer_under_two_names(tmp_path):
    torch.manual_seed(0)
    dense = Shared(transformers.PreTrainedConfig())
    dense.config.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if not name.startswith("again.")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = Shared.from_pretrained(tmp_path, quantization_config=bnbq.BnbqConfig(**NF4))
    assert isinstance(model.first, bnbq.nn.Linear4bit) and model.again is model.first
    assert torch.equal(model.first.qweight, bnbq.nn.Linear4bit.from_linear(dense.first).qweight)
    assert model(torch.randn(3, 64)).isfinite().all()
    assert model.dequantize().again is model.first and type(model.first) is torch.nn.Linear


# ------------------------------------------------------------------ beyond decoders of text

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SPEECH = dict(
    **SMALL,
    conv_dim=(32, 32),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    vocab_size=32,
)
ENCODER_DECODER = dict(
    d_model=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    vocab_size=64,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
)


def pixels(batch=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def sound(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CLIP = dict(
    text_config=dict(**SMALL, vocab_size=64, max_position_embeddings=32, eos_token_id=2),
    vision_config=dict(**SMALL, image_size=32, patch_size=8),
    projection_dim=48,
)
# model class, config class, settings, inputs, inputs of generate or None, linear layers quantised, and kept in float
FAMILIES = {
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        dict(**ENCODER_DECODER, max_position_embeddings=32, forced_eos_token_id=2),
        lambda: dict(input_ids=IDS, decoder_input_ids=IDS),
        lambda: dict(input_ids=IDS),
        16,
        {"lm_head"},
    ),
    "t5 gated, untied": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0,
             feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        lambda: dict(input_ids=IDS, decoder_input_ids=IDS),
        lambda: dict(input_ids=IDS),
        16,
        {"lm_head", "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(**ENCODER_DECODER, num_mel_bins=16, max_source_positions=32, max_target_positions=32),
        lambda: dict(input_features=sound(1, 16, 64), decoder_input_ids=IDS),
        lambda: dict(input_features=sound(1, 16, 64)),
        16,
        {"proj_out"},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        SPEECH,
        lambda: dict(input_values=sound(1, 800)),
        None,
        13,
        {"lm_head"},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        dict(**SMALL, image_size=32, patch_size=8, num_labels=5),
        lambda: dict(pixel_values=pixels()),
        None,
        12,
        {"classifier"},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        CLIP,
        lambda: dict(input_ids=torch.cat([IDS, IDS]), pixel_values=pixels(2)),
        None,
        25,
        {"text_projection"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [dict(bits=4), dict(bits=4, double_quant=True, checkpoint_format="bitsandbytes"), dict(bits=8)], ids=str)
def test_encoder_decoders_vision_and_audio(tmp_path, family, settings):
    """Quantised while loading and in memory alike; the same outputs after saving and loading."""
    name, config_name, architecture, inputs, prompt, count, kept = FAMILIES[family]
    kind = getattr(transformers, name)
    build(getattr(transformers, config_name), kind, tmp_path / "float", **architecture)
    dense = kind.from_pretrained(tmp_path / "float")

    @torch.no_grad()
    def run(model):
        output = model(**inputs())
        return output.logits if hasattr(output, "logits") else torch.cat([output.text_embeds, output.image_embeds])

    config = bnbq.BnbqConfig(**settings)
    model, info = kind.from_pretrained(tmp_path / "float", quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(layers(model)) == count and linears - layers(model).keys() == kept
    assert close(run(model), run(dense), 0.3 if settings["bits"] == 4 else 0.05)
    assert all(a.dtype == b.dtype for n, a in model.named_parameters() for b in [dict(dense.named_parameters()).get(n, a)])
    model.save_pretrained(tmp_path / "packed")
    again = bnbq.from_pretrained(kind, tmp_path / "packed")
    assert_same(again, model)
    assert torch.equal(run(again), run(model))
    in_memory = kind.from_pretrained(tmp_path / "float")
    bnbq.quantize_model(in_memory, config)
    assert_same(in_memory, model)
    if prompt is not None:
        tokens = [one.generate(**prompt(), min_new_tokens=3, max_new_tokens=4, do_sample=False) for one in (model, again)]
        assert torch.equal(*tokens) and tokens[0].shape[1] > 2
