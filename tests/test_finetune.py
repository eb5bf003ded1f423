"""benchmarks/finetune.py: LoRA on a quantised base learns what it learns on the dequantised weights in bf16."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft")
pytest.importorskip("pydoc_data.topics", reason="this Python comes without its language reference")

from benchmarks import finetune, tables  # noqa: E402

import small_models  # noqa: E402
from bnbq import fetch  # noqa: E402


def test_runs_on_a_tiny_model(tmp_path, monkeypatch):
    folder = small_models.llama(tmp_path / "llama")
    monkeypatch.setattr(fetch, "demo_model", lambda: folder)
    monkeypatch.setattr(finetune, "quiet", lambda: None)
    sizes = "--steps 2 --windows 2 --judged 2 --length 32 --rank 2 --threads 1 --format int8".split()
    out = tmp_path / "finetune.jsonl"
    results = finetune.main([*sizes, "--out", str(out), "--keep", str(tmp_path / "adapters")])
    assert set(results) == {("int8", "quantised"), ("int8", "bf16")}
    for before, after, _ in results.values():
        assert 4 < after < 7 and before != after
    assert (tmp_path / "adapters" / "int8-bf16" / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("base") for row in rows[1:-1]] == ["quantised", "bf16"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    ours, dense = (results["int8", base].after for base in tables.BASES)
    assert f"| {ours:.4f} |" in tables.finetune() and f"| {100 * (ours / dense - 1):+.2f} % |" in tables.finetune()


@pytest.mark.slow
def test_same_held_out_loss_as_on_the_dequantised_weights(tmp_path):
    """The demo's model, minutes: within 1 % after a fine-tune that gains much more than that."""
    if not (fetch.cache_root() / fetch.FOLDER / fetch.SOURCE).is_file():
        pytest.skip("the demo's model is not in the cache; `bnbq demo` fetches it")
    results = finetune.main(["--quick", "--out", str(tmp_path / "out.jsonl")])
    ours, theirs = results["nf4 dq", "quantised"], results["nf4 dq", "bf16"]
    assert ours.after < 0.95 * ours.before
    assert abs(ours.after / theirs.after - 1) < 0.01 and abs(ours.before / theirs.before - 1) < 0.01
