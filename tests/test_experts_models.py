"""Mixtures of experts of Transformers: quantised while they load or live, saved, streamed, offloaded, in every layout."""

import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from safetensors.torch import load_file, save_file  # noqa: E402

import bnbq  # noqa: E402
import processes  # noqa: E402
from bnbq import nn  # noqa: E402
from bnbq.experts import Experts4bit, Experts8bit, find  # noqa: E402
from hf import AUTO, IDS, assert_same, file_tensors, logits, quantized  # noqa: E402
from moe_models import LAYOUTS, SETTINGS, SMALL, build, linear, packed_experts  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """(folder of a float checkpoint, the model loaded from it)."""
    return build(request.param, tmp_path_factory.mktemp(request.param))


def loop(module, hidden_states, top_k_index, top_k_weights, settings, dense):
    """The definition: for each expert a layer of bnbq.nn per projection; sums as in Transformers' grouped_mm."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    kind = nn.Linear4bit if settings.get("bits") == 4 else nn.Linear8bitLt
    config = bnbq.BnbqConfig(**settings).layer_settings()
    result = torch.zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=top_k_weights.dtype)
    for e in top_k_index.unique().tolist():
        token, place = (top_k_index == e).nonzero().T

        def project(name, x, e=e):
            w = getattr(dense, name)[e].detach()
            bias = getattr(dense, f"{name}_bias")[e].detach() if module.has_bias else None
            return kind.from_linear(linear(w.T.contiguous() if module.is_transposed else w, bias), **config)(x)

        x = project(first, hidden_states[token])
        x = project("down_proj", module._apply_gate(x) if module.has_gate else module.act_fn(x))
        result[token, place] = x * top_k_weights[token, place, None]
    return result.sum(1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_experts_are_quantised_while_loading(layout, settings, tmp_path):
    folder, dense = layout
    model, info = quantized(folder, settings, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = find(dense)
    assert found and packed_experts(model).keys() == found.keys()
    kind = Experts4bit if settings["bits"] == 4 else Experts8bit
    size = 0
    for name, packed in packed_experts(model).items():
        wanted = kind.from_weight(found[name].weight, found[name].transposed, **packed.settings())
        for leaf, tensor in wanted.state_dict().items():
            assert torch.equal(getattr(packed, leaf), tensor), f"{name}.{leaf}"
        assert not any(parameter.requires_grad for parameter in packed.parameters())
        numbers = found[name].weight.numel()
        resident = sum(p.numel() * p.element_size() for p in packed.parameters())
        bits = 8 * resident / numbers
        # int8 stores 4 bytes a row of at least 64, double quantisation 5 bytes for few blocks, plain nf4 half a bit
        assert (4 < bits < 4.6) if settings["bits"] == 4 else (8 < bits <= 8.5)
        size += numbers * 4 - resident
    # Exactly the packed bytes are resident: nothing float is left behind.
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    for name, layer in linears.items():
        size += dense.get_submodule(name).weight.numel() * 4
        size -= sum(layer._parameters[leaf].numel() * layer._parameters[leaf].element_size() for leaf in layer.packed_spec())
    assert bnbq.get_memory_footprint(dense) - bnbq.get_memory_footprint(model) == size
    for name, parameter in model.named_parameters():
        if "router" in name or name.endswith("gate.weight"):
            assert parameter.is_floating_point() and torch.equal(parameter, dense.get_parameter(name))
    assert (logits(model) - logits(dense)).norm() < 0.35 * logits(dense).norm()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_block_equals_a_loop_over_its_experts(layout, settings):
    folder, dense = layout
    model = quantized(folder, settings)
    name = next(iter(packed_experts(model))).rpartition(".")[0]
    experts, count = model.get_submodule(name), model.get_submodule(name).num_experts
    generator = torch.Generator().manual_seed(1)
    for tokens, k in ((1, 2), (7, 2), (20, 3)):
        hidden = torch.randn(tokens, 64, generator=generator)
        index = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)])
        scores = torch.rand(tokens, k, generator=generator)
        expected = loop(experts, hidden, index, scores, settings, dense.get_submodule(name))
        with torch.no_grad():
            assert torch.equal(experts(hidden, index, scores), expected)
            masked = index.clone()
            masked[0, 0] = count  # no expert
            scores = scores.clone()
            assert torch.equal(experts(hidden, masked, scores)[1:], expected[1:])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_saved_and_loaded_again(layout, settings, tmp_path):
    folder, dense = layout
    model = quantized(folder, settings)
    model.save_pretrained(tmp_path / "packed")
    again, info = AUTO.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert_same(AUTO.from_pretrained(tmp_path / "again"), model)


def test_embeddings_are_quantised_beside_experts(layout):
    folder, dense = layout
    settings = {"bits": 4, "quantize_embeddings": True}
    model = quantized(folder, settings)
    assert isinstance(model.get_input_embeddings(), nn.Embedding4bit)
    assert packed_experts(model).keys() == find(dense).keys()
    assert (logits(model) - logits(dense)).norm() < 0.4 * logits(dense).norm()


@pytest.mark.parametrize("place", ["cpu", "disk", "both"])
def test_offloaded(layout, place, tmp_path):
    folder, _ = layout
    model = quantized(folder, {"bits": 4, "double_quant": True})
    model.save_pretrained(tmp_path / "packed")
    devices = {name: place for name, _ in model.named_children()}
    if place == "both":
        devices = {"model": "disk", "lm_head": "cpu"}
    for source, settings in ((folder, {"quantization_config": model.config.quantization_config}), (tmp_path / "packed", {})):
        offloaded = AUTO.from_pretrained(source, device_map=devices, offload_folder=tmp_path / "offload", **settings)
        assert torch.equal(logits(offloaded), logits(model))
        if place != "cpu":
            assert all(packed.qweight.is_meta for packed in packed_experts(offloaded).values())
            offloaded.save_pretrained(tmp_path / "saved")
            assert_same(AUTO.from_pretrained(tmp_path / "saved"), model)


def test_a_live_model(layout, tmp_path):
    folder, _ = layout
    loaded, model = quantized(folder, {"bits": 4}), AUTO.from_pretrained(folder)
    report = bnbq.quantize_model(model)
    assert_same(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    rows = {row.name: row for row in report.quantized if not row.linear}
    assert rows.keys() == packed_experts(model).keys() and f"and {len(rows)} expert weights" in report.summary()
    assert all(row.kind == "Experts4bit" and row.format == "nf4/64" and row.kernel for row in rows.values())
    assert bnbq.count_parameters(model) == sum(p.numel() for p in AUTO.from_pretrained(folder).parameters())
    against = bnbq.report(model, against=AUTO.from_pretrained(folder))
    assert all(0.05 < row.error < 0.12 for row in against.rows if row.name in rows)
    packed = next(iter(packed_experts(model).values()))
    assert "expert by expert" in str(bnbq.explain(packed, m=1)) and "Experts4bit" in str(bnbq.explain(packed))
    model.save_pretrained(tmp_path)
    assert_same(AUTO.from_pretrained(tmp_path), model)
    offloaded = AUTO.from_pretrained(folder)
    devices = {"model": "disk", "lm_head": "cpu"}
    bnbq.quantize_model(offloaded, device_map=devices, offload_folder=tmp_path / "offload")
    assert all(packed.qweight.is_meta for packed in packed_experts(offloaded).values())
    assert torch.equal(logits(offloaded), logits(loaded))


def test_dequantised_back(layout):
    folder, dense = layout
    model = quantized(folder, {"bits": 4})
    values = {name: packed.dequantize() for name, packed in packed_experts(model).items()}
    before = logits(model)
    back = model.dequantize()
    assert find(back).keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(back.get_parameter(name), value)
    assert torch.allclose(logits(back), before, atol=1e-5)


def test_other_implementations_compute_the_same(layout):
    """A model told to compute its experts itself reads dequantised ones; what cannot is an error that says so."""
    folder, _ = layout
    model = quantized(folder, {"bits": 4})
    before = logits(model)
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert torch.allclose(logits(model), before, atol=1e-5)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(AttributeError, match='set_experts_implementation."bnbq"'):
        logits(model)
    model.set_experts_implementation("bnbq")
    assert torch.equal(logits(model), before)


def test_compiled_whole_without_recompiling_for_another_routing(layout):
    folder, _ = layout
    if "nemotron" in str(folder):
        pytest.skip("Transformers' Mamba model is not compiled whole")
    model = quantized(folder, {"bits": 4})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, logits(model))
        with torch._dynamo.config.patch(error_on_recompile=True):
            other = IDS.flip(1) * 3
            assert torch.equal(compiled(other, use_cache=False).logits, logits(model, other))


def test_generates(layout):
    folder, _ = layout
    model = quantized(folder, {"bits": 4})
    ids = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    expected = IDS
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected)


# ------------------------------------------------------------------ choices and damage


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return build("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_skipped_experts_stay_float(mixtral, tmp_path):
    folder, dense = mixtral
    for skip, left in (("experts", 0), ("layers.0", 2), ("down_proj", 2)):
        model = quantized(folder, {"bits": 4, "skip_modules": [skip]})
        assert len(packed_experts(model)) == left
        for name, weight in find(model).items():
            assert torch.equal(weight.weight, dense.get_parameter(name)) and skip in name
        assert (logits(model) - logits(dense)).norm() < 0.35 * logits(dense).norm()
        model.save_pretrained(tmp_path / skip)
        again, info = AUTO.from_pretrained(tmp_path / skip, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_same(again, model)
        assert torch.equal(logits(again), logits(model))
        rows = bnbq.report(model).rows
        assert any(row.why == f"skip_modules: {skip}" for row in rows if row.name.endswith("experts"))


def test_checkpoints_from_before_experts_were_quantised_load(mixtral, tmp_path):
    """The files decide, not the rules: a packed checkpoint whose experts are float keeps them."""
    folder, dense = mixtral
    model = quantized(folder, {"bits": 4, "skip_modules": ["experts"]})
    model.config.quantization_config.skip_modules = None
    model.save_pretrained(tmp_path)
    again, info = AUTO.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not packed_experts(again)
    assert_same(again, model)


def test_an_incomplete_checkpoint_is_an_error(mixtral, tmp_path):
    folder, _ = mixtral
    quantized(folder, {"bits": 4}).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.down_proj.qweight"))
    for damage, message in (
        (lambda t: t.pop(name), "down_proj.qweight is missing"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(name.removesuffix("qweight"))], "incomplete"),
        (lambda t: t.update({name: t[name][1:].clone()}), r"\[3, 64, 64\]"),
        (lambda t: t.update({name: t[name].to(torch.float32)}), "F32"),
    ):
        damaged = dict(tensors)
        damage(damaged)
        save_file(damaged, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AUTO.from_pretrained(tmp_path)


def test_a_bad_float_checkpoint_is_an_error(mixtral, tmp_path):
    folder, _ = mixtral
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = file_tensors(folder)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][5, 3] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj: expert 2: .* at index \(133, 3\)"):
        quantized(tmp_path, {"bits": 4})


def test_a_converter_that_matches_the_name_of_packed_experts(tmp_path):
    """Qwen3-VL's converter turns its experts' weights if need be: the float ones, never the packed ones."""
    text = dict(SMALL, moe_intermediate_size=32, intermediate_size=64, head_dim=16, num_experts=4, num_experts_per_tok=2)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, deepstack_visual_indexes=[0])
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}, vision_config=vision
    )
    torch.manual_seed(0)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    kind(config).eval().save_pretrained(tmp_path / "float")
    dense = kind.from_pretrained(tmp_path / "float")
    model, info = kind.from_pretrained(
        tmp_path / "float", quantization_config=bnbq.BnbqConfig(bits=4, blocksize=32), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(packed_experts(model)) == 4
    for name, packed in packed_experts(model).items():
        wanted = Experts4bit.from_weight(dense.get_parameter(name), blocksize=32)
        assert torch.equal(packed.qweight, wanted.qweight) and torch.equal(packed.absmax, wanted.absmax)
    model.save_pretrained(tmp_path / "packed")
    again, info = kind.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model))


def test_experts_that_no_interface_computes_stay_float(tmp_path):
    """Llama 4 multiplies all experts at once, JetMoE in a loop of its own: said, not guessed."""
    config = transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=16,
        interleave_moe_layer_step=1,
    )
    model = AUTO.from_config(config).eval()
    with pytest.warns(UserWarning, match="3-D expert weights outside of Transformers' experts interface"):
        report = bnbq.quantize_model(model)
    assert not packed_experts(model) and "expert weights quantised" not in report.summary()
    assert logits(model).isfinite().all()


def test_saved_and_loaded_without_transformers(layout, tmp_path):
    """bnbq.save and bnbq.load, of what Transformers does not save; into a float model and into a quantised one."""
    folder, dense = layout
    model = quantized(folder, {"bits": 4, "quant_type": "fp4", "double_quant": True})
    bnbq.save(model, tmp_path)
    again = bnbq.load(AUTO.from_pretrained(folder), tmp_path)
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model))
    assert_same(bnbq.load(again, tmp_path), model)
    name, packed = next(iter(packed_experts(again).items()))
    parent, _, leaf = name.rpartition(".")
    setattr(again.get_submodule(parent), leaf, Experts4bit(2, packed.in_features, packed.out_features))
    with pytest.raises(ValueError, match=rf"{name} is .*; the model's is \[2, "):
        bnbq.load(again, tmp_path)


def empty(folder):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        return AUTO.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loaded_and_dispatched_by_accelerate(layout, settings, tmp_path):
    """load_and_quantize stacks as from_pretrained does, also what several files hold, and reads what either saved."""
    folder, dense = layout
    config, model = bnbq.BnbqConfig(**settings), quantized(folder, settings)
    loaded = bnbq.load_and_quantize(empty(folder), config, folder)
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    dense.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    split = {"model": "disk", "lm_head": "cpu"}
    for place in ({"": "cpu"}, {"": "disk"}, split):
        loaded = bnbq.load_and_quantize(
            empty(folder), config, tmp_path / "shards", device_map=place, offload_folder=tmp_path / "offload"
        )
        assert all(packed.qweight.is_meta == (place != {"": "cpu"}) for packed in packed_experts(loaded).values())
        assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(tmp_path / "packed")
    assert_same(bnbq.load_and_quantize(empty(folder), config, tmp_path / "packed"), model)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t, name: t.pop(name), "gate_up_proj, made of .*experts.0.w1.weight and 6 others"),
        (lambda t, name: [t.pop(n) for n in list(t) if "layers.1" in n and ".w2." in n], "not in .*mlp.experts.down_proj"),
        (lambda t, name: t[name][5, 3].fill_(float("nan")), r"gate_up_proj: expert 2: .* at index \(133, 3\)"),
        (lambda t, name: t.update({name: t[name][:5].clone()}), "gate_up_proj, made of"),
        (lambda t, name: [t.pop(n) for n in list(t) if "layers.1" in n and ".experts.3." in n], r"gate_up_proj.*\[3, 256, 64\]"),
    ],
)
def test_accelerates_way_refuses_damaged_experts(mixtral, tmp_path, damage, message):
    folder, _ = mixtral
    tensors = file_tensors(folder)
    damage(tensors, "model.layers.1.block_sparse_moe.experts.2.w3.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        bnbq.load_and_quantize(empty(folder), bnbq.BnbqConfig(), tmp_path)


def test_streamed_on_the_command_line(layout, tmp_path):
    """bnbq quantize writes what from_pretrained and save_pretrained write, names included; bnbq report lists it."""
    from bnbq import checkpoint_report, stream

    folder, dense = layout
    settings = {"bits": 4, "double_quant": True}
    summary = stream.quantize_checkpoint(folder, tmp_path / "out", bnbq.BnbqConfig(**settings), progress=False)
    model = quantized(folder, settings)
    assert summary.experts == len(packed_experts(model))
    assert_same(AUTO.from_pretrained(tmp_path / "out"), model)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = file_tensors(tmp_path / "out"), file_tensors(tmp_path / "saved")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    dense.save_pretrained(tmp_path / "shards", max_shard_size="30KB")  # an expert weight's tensors in several files
    stream.quantize_checkpoint(tmp_path / "shards", tmp_path / "whole", bnbq.BnbqConfig(**settings), progress=False)
    whole = file_tensors(tmp_path / "whole")
    assert whole.keys() == ours.keys() and all(torch.equal(whole[name], tensor) for name, tensor in ours.items())
    facts = checkpoint_report.examine(tmp_path / "out", folder)
    rows = {row["name"]: row for row in facts["layers"] if ".experts." in row["name"]}
    assert len(rows) == summary.experts and checkpoint_report.describe(facts)
    for name, row in rows.items():
        in_one_piece = name in file_tensors(folder)
        assert (row["error"] is not None) == (in_one_piece and len(row["shape"]) == 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["from_pretrained", "load_and_quantize"])
def test_loading_holds_no_dense_model(tmp_path, mixtral, how):
    """At most the packed model and the tensors of one expert weight: single, stacked and joined."""
    config = transformers.Qwen3MoeConfig(
        **{**SMALL, "hidden_size": 256, "num_hidden_layers": 10},
        intermediate_size=256,
        moe_intermediate_size=512,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    AUTO.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    dense = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    largest = 16 * 1024 * 256 * 2
    empty = "accelerate.init_empty_weights()(auto.from_config)(transformers.AutoConfig.from_pretrained({0!r}))"
    load = {
        "from_pretrained": "model = bnbq.from_pretrained(auto, {0!r}, load_in_4bit=True)",
        "load_and_quantize": f"model = bnbq.load_and_quantize({empty}, bnbq.BnbqConfig(), {{0!r}})",
    }[how]
    peak, packed = processes.memory_growth(
        "import accelerate, transformers, bnbq; auto = transformers.AutoModelForCausalLM",
        load.format(str(mixtral[0])),
        load.format(str(tmp_path)),
        "bnbq.get_memory_footprint(model)",
    )
    assert packed < 0.32 * dense and 13 * largest < dense
    assert peak < packed + 3 * largest + (4 << 20), (peak, packed, largest, dense)
