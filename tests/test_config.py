"""BnbqConfig: what it accepts, what it refuses and how, and its JSON."""

import json

import pytest
import torch

from bnbq.config import BnbqConfig


def test_defaults():
    config = BnbqConfig()
    assert (config.quant_method, config.version, config.bits) == ("bnbq", 1, 4)
    assert (config.quant_type, config.blocksize, config.double_quant) == ("nf4", 64, False)
    assert config.compute_dtype is None and config.threshold == 6.0
    assert config.skip_modules is None and config.checkpoint_format == "bnbq"
    assert BnbqConfig(load_in_4bit=True) == config == BnbqConfig(bits=4, load_in_8bit=False)


def test_activations():
    config = BnbqConfig(activations="int8")
    assert config.layer_settings()["activations"] == "int8" and BnbqConfig().layer_settings()["activations"] is None
    stored = config.to_dict()
    assert stored["activations"] == "int8" and "activations" not in BnbqConfig().to_dict()
    assert BnbqConfig.from_dict(json.loads(json.dumps(stored))) == config != BnbqConfig()
    for bad, kind, text in (
        ({"activations": "fp8"}, ValueError, "activations: got 'fp8'"),
        ({"activations": 8}, TypeError, "activations: got 8"),
        ({"activations": "int8", "bits": 8}, ValueError, "is for 4-bit layers"),
    ):
        with pytest.raises(kind, match=text):
            BnbqConfig(**bad)


def test_eight_bits():
    config = BnbqConfig(load_in_8bit=True, llm_int8_threshold=4)
    assert (config.bits, config.quant_type, config.blocksize, config.threshold) == (8, "int8", 0, 4.0)
    assert BnbqConfig(bits=8, blocksize=64).blocksize == 64


def test_bitsandbytes_names_mean_ours():
    config = BnbqConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=["a"],
        llm_int8_enable_fp32_cpu_offload=True,
        llm_int8_has_fp16_weight=False,
    )
    assert config == BnbqConfig(quant_type="fp4", double_quant=True, compute_dtype=torch.bfloat16, skip_modules=("a",))
    # As in bitsandbytes, arguments for the other number of bits have no effect.
    assert BnbqConfig(load_in_8bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float16") == BnbqConfig(
        bits=8
    )
    assert BnbqConfig(load_in_8bit=True, bnb_8bit_compute_dtype="float16").compute_dtype == torch.float16
    assert (
        BnbqConfig(
            quant_type="fp4", bnb_4bit_quant_type="fp4", compute_dtype="float32", bnb_4bit_compute_dtype=torch.float32
        ).quant_type
        == "fp4"
    )


@pytest.mark.parametrize(
    "given, parsed",
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
        ("auto", None),
        (None, None),
    ],
)
def test_compute_dtype_by_name(given, parsed):
    assert BnbqConfig(compute_dtype=given).compute_dtype is parsed


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "both True"),
        ({"load_in_4bit": False}, ValueError, "nothing would be quantised"),
        ({"bits": 4, "load_in_8bit": True}, ValueError, "contradict"),
        ({"bits": 5}, ValueError, "expected 4 or 8"),
        ({"bits": "4"}, TypeError, "expected 4 or 8"),
        ({"load_in_4bit": "yes"}, TypeError, "load_in_4bit: got 'yes'"),
        ({"quant_type": "nf5"}, ValueError, "'nf5'; known: nf4, fp4, int4"),
        ({"quant_type": 4}, TypeError, "quant_type"),
        ({"bnb_4bit_quant_type": "af4"}, ValueError, "bnb_4bit_quant_type: unknown 4-bit format 'af4'"),
        ({"bits": 8, "quant_type": "nf4"}, ValueError, "'nf4' with 8 bits"),
        ({"blocksize": 48}, ValueError, "got 48, expected one of 32, 64"),
        ({"blocksize": 0}, ValueError, "got 0"),
        ({"blocksize": 64.0}, TypeError, "expected an int"),
        ({"bits": 8, "blocksize": 48}, ValueError, "expected one of 0, 32"),
        ({"bits": 8, "double_quant": True}, ValueError, "double_quant"),
        ({"double_quant": 1}, TypeError, "expected True or False"),
        ({"compute_dtype": "int8"}, TypeError, "one of float32, bfloat16, float16"),
        ({"compute_dtype": torch.int8}, TypeError, "torch.int8"),
        ({"compute_dtype": torch.float64}, TypeError, "float64"),
        ({"bnb_4bit_compute_dtype": "bf16"}, ValueError, "bnb_4bit_compute_dtype: 'bf16' is not the name of a dtype"),
        ({"compute_dtype": 16}, TypeError, "got 16"),
        ({"bnb_4bit_quant_storage": "int3"}, ValueError, "bnb_4bit_quant_storage"),
        ({"llm_int8_has_fp16_weight": True}, ValueError, "no 16-bit copy"),
        ({"threshold": -1}, ValueError, "threshold: got -1"),
        ({"threshold": float("nan")}, ValueError, "finite"),
        ({"threshold": "6"}, TypeError, "expected a number"),
        ({"llm_int8_threshold": -0.5}, ValueError, "llm_int8_threshold"),
        ({"skip_modules": "lm_head"}, TypeError, "expected a list of module names"),
        ({"skip_modules": [3]}, TypeError, "got 3 in the list"),
        ({"include_modules": [""]}, TypeError, "include_modules"),
        (
            {"quant_type": "nf4", "bnb_4bit_quant_type": "fp4"},
            ValueError,
            "quant_type='nf4' and bnb_4bit_quant_type='fp4' contradict",
        ),
        ({"threshold": 5.0, "llm_int8_threshold": 6.0}, ValueError, "contradict"),
        ({"checkpoint_format": "gguf"}, ValueError, "expected one of bnbq, bitsandbytes"),
        ({"checkpoint_format": "bitsandbytes", "quant_type": "int4"}, ValueError, "bitsandbytes has no int4"),
        ({"checkpoint_format": "bitsandbytes", "bits": 8, "blocksize": 64}, ValueError, "one scale per row"),
        ({"version": 2}, ValueError, "upgrade bnbq"),
        ({"version": "1"}, ValueError, "version: got '1'"),
        ({"quant_method": "gptq"}, ValueError, "quant_method"),
        ({"quant_typ": "nf4"}, TypeError, "unknown argument 'quant_typ'; did you mean 'quant_type'"),
        ({"whatever": 1}, TypeError, "unknown argument 'whatever'"),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, kind, text):
    with pytest.raises(kind) as error:
        BnbqConfig(**arguments)
    assert text in str(error.value)


CONFIGS = [
    BnbqConfig(),
    BnbqConfig(load_in_8bit=True, threshold=0),
    BnbqConfig(quant_type="int4", blocksize=128, compute_dtype="float16"),
    BnbqConfig(double_quant=True, skip_modules=["a", "b"], include_modules=["lm_head"]),
    BnbqConfig(quant_type="fp4", compute_dtype="bfloat16", checkpoint_format="bitsandbytes"),
    BnbqConfig(bits=8, checkpoint_format="bitsandbytes"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_native_json_round_trip(config):
    text = json.dumps(config.to_native_dict())
    assert BnbqConfig.from_dict(json.loads(text)) == config
    assert "load_in_" not in text and json.loads(text)["quant_method"] == "bnbq"


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_json_of_the_checkpoint_format(config):
    values = json.loads(json.dumps(config.to_dict()))
    if config.checkpoint_format == "bnbq":
        assert values == config.to_native_dict()
        return
    assert values["quant_method"] == "bitsandbytes" and values["load_in_4bit"] == (config.bits == 4)
    again = BnbqConfig.from_dict(values)
    assert again.checkpoint_format == "bitsandbytes"
    assert (again.bits, again.quant_type, again.threshold) == (config.bits, config.quant_type, config.threshold)


def test_from_dict_options():
    config, unused = BnbqConfig.from_dict(BnbqConfig().to_dict(), return_unused_kwargs=True, double_quant=True, foo=1)
    assert config.double_quant and unused == {"foo": 1}
    with pytest.raises(ValueError, match=r"version 7.*upgrade"):
        BnbqConfig.from_dict({**BnbqConfig().to_dict(), "version": 7, "from_the_future": 1})


def test_the_json_is_a_copy():
    config = BnbqConfig(skip_modules=["a"])
    config.to_dict()["skip_modules"].append("b")
    assert config.skip_modules == ["a"]


# ------------------------------------------------------------------ bitsandbytes' settings


def test_from_bnb_json_with_missing_keys_has_the_defaults_of_bitsandbytes():
    config = BnbqConfig.from_bnb({"load_in_4bit": True})
    assert (config.quant_type, config.double_quant, config.compute_dtype, config.threshold) == ("fp4", False, None, 6.0)
    assert BnbqConfig.from_bnb({"load_in_8bit": True, "load_in_4bit": False}).bits == 8
    assert BnbqConfig.from_bnb({"_load_in_8bit": True}).bits == 8


def test_from_bnb_json_as_published():
    values = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
        "something_new": 1,
    }
    expected = BnbqConfig(quant_type="nf4", double_quant=True, compute_dtype="bfloat16", skip_modules=["lm_head"])
    assert BnbqConfig.from_bnb(values) == expected
    assert BnbqConfig.from_bnb(values, compute_dtype="float16").compute_dtype == torch.float16


@pytest.mark.parametrize(
    "given, kind, text",
    [
        ({"load_in_4bit": False, "load_in_8bit": False}, ValueError, "nothing would be quantised"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "both True"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "xx"}, ValueError, "unknown 4-bit format 'xx'"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, ValueError, "no 16-bit copy"),
        ({"bits": 4}, TypeError, "BitsAndBytesConfig"),
        (object(), TypeError, "BitsAndBytesConfig"),
        (BnbqConfig(), TypeError, "BnbqConfig"),
    ],
)
def test_from_bnb_refuses(given, kind, text):
    with pytest.raises(kind, match=text):
        BnbqConfig.from_bnb(given)


def test_from_bnb_object():
    transformers = pytest.importorskip("transformers")
    config = BnbqConfig.from_bnb(transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert config.quant_type == "fp4" and config.compute_dtype == torch.float32  # what that object says
    given = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0, llm_int8_skip_modules=["a"])
    assert BnbqConfig.from_bnb(given) == BnbqConfig(bits=8, threshold=3.0, skip_modules=["a"])


def test_layer_settings_build_layers():
    from bnbq import nn

    four = nn.Linear4bit(
        64, 8, device="meta", **BnbqConfig(quant_type="int4", blocksize=32, double_quant=True).layer_settings()
    )
    assert four.format() == {"quant_type": "int4", "blocksize": 32, "double_quant": True}
    eight = nn.Linear8bitLt(64, 8, device="meta", **BnbqConfig(bits=8, threshold=2).layer_settings())
    assert eight.threshold == 2.0
