"""Each benchmark runs, in a tiny setting, and leaves results that the tables and the plot can read."""

import json
import logging
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bnbq import _bnbq

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import against, common, contenders, kernels, layers, models, tables  # noqa: E402

sys.path.remove(str(ROOT))

TINY = ["--quick", "--rounds", "2", "--threads", "1"]


def shrink(monkeypatch):
    """Slots so short and copies so few that a run takes a second."""
    monkeypatch.setattr(common, "COLD_BYTES", 1 << 18)
    monkeypatch.setattr(common, "SLOT_SECONDS", 1e-4)


@pytest.fixture(autouse=True)
def shrunk_and_restored(monkeypatch):
    """torch's threads, the kernels and logging are put back."""
    shrink(monkeypatch)
    threads, isa = torch.get_num_threads(), _bnbq.isa()
    yield
    torch.set_num_threads(threads)
    _bnbq.set_isa(isa)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as benchmarks/results is, with a run of everything that against.py measures."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        against.main(
            [*TINY, "--all", "--shapes", "64x128", "128x64", "--m", "1", "5", "--out", str(folder / "layers.jsonl")]
        )
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_spread(row: dict, unit: str) -> None:
    assert 0 < row[f"{unit}_min"] <= row[unit] <= row[f"{unit}_max"] < 60_000, row


# ------------------------------------------------------------------ what is measured


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_contender_multiplies_by_the_same_weight(dtype, training):
    pytest.importorskip("bitsandbytes")
    n, k = 128, 256
    built = contenders.build(n, k, dtype, [""], training)
    assert {"bnbq nf4", "bnbq int8", "torch fp32", "bitsandbytes nf4", "bitsandbytes int8"} <= set(built)
    x = contenders.activations(8, k, "6")
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, layer in built.items():
        assert len(layer.layers) == common.copies(layer.nbytes) > 1
        y = layer(x.to(layer.dtype), 0)
        assert torch.equal(y, layer(x.to(layer.dtype), 1)), name
        error = float((y.float() - x @ w.T).norm() / (x @ w.T).norm())
        assert error < (0.12 if "4" in name else 0.04), (name, error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_copies_of_a_contender_share_no_memory():
    def addresses(layer):
        tensors = layer.weight if isinstance(layer, contenders.Product) else layer.parameters()
        return {tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}

    for name, layer in contenders.build(64, 128, torch.bfloat16, [""]).items():
        if name != "torch dynamic int8":  # its tensors cannot be reached
            first, second = map(addresses, layer.layers[:2])
            assert first and not first & second, name


@pytest.mark.parametrize("outliers, columns", [("none", 0), ("6", 6), ("1%", 2), ("40%", 80), ("first-token", 3)])
def test_activations_have_the_outliers_asked_for(outliers, columns):
    x = contenders.activations(257, 200, outliers).abs() >= 6
    assert int(x.any(0).sum()) == columns
    assert int(x.any(1).sum()) == {"none": 0, "first-token": 2}.get(outliers, 257)


def test_interleaved_contenders_take_turns_and_use_every_copy():
    order = []

    def slow(name):
        def call(i):
            order.append((name, i))
            time.sleep(2 * common.SLOT_SECONDS)

        return call

    seconds = common.interleave({"a": slow("a"), "b": slow("b")}, rounds=3)
    assert [name for name, _ in order] == list("ababbaab")
    assert [i for name, i in order if name == "a"] == [0, 1, 2, 3]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())


# ------------------------------------------------------------------ against.py


def test_against_writes_a_complete_run(published):
    first, *rows, last = lines(published / "layers.jsonl")
    assert first["run"] == "against" and first["cpu"] and first["commit"] and last == {"end": True}
    assert all(value > 0 for value in first["limits"]["1"].values())
    kinds = {row["kind"] for row in rows}
    assert kinds == {"linear", "backward", "quantize", "call"}
    for row in rows:
        check_spread(row, "us" if row["kind"] == "call" else "ms")
    linear = [row for row in rows if row["kind"] == "linear"]
    assert {(row["n"], row["k"], row["m"]) for row in linear} == {
        (n, k, m) for n, k in ((64, 128), (128, 64)) for m in (1, 5)
    }
    assert all(row["limit_ms"] > 0 for row in linear)


def test_only_some_contenders_and_float32(tmp_path):
    against.main(
        [
            *TINY,
            "--shapes",
            "64x64",
            "--m",
            "3",
            "--only",
            "bnbq int8",
            "fp32",
            "--dtype",
            "fp32",
            "--outliers",
            "first-token",
            "--out",
            str(tmp_path / "out.jsonl"),
        ]
    )
    rows = lines(tmp_path / "out.jsonl")[1:-1]
    assert [row["contender"] for row in rows] == ["bnbq int8", "torch fp32"]
    assert {(row["dtype"], row["outliers"]) for row in rows} == {("fp32", "first-token")}


# ------------------------------------------------------------------ results, tables, plot


def test_an_interrupted_run_is_not_read(published, tmp_path):
    path = tmp_path / "layers.jsonl"
    complete = (published / "layers.jsonl").read_text()
    path.write_text(complete + complete.replace("against", "interrupted").rpartition('{"end"')[0])
    assert common.newest(path, "linear").about["run"] == "against"
    path.write_text(complete + complete.replace("against", "later"))
    assert common.newest(path, "linear").about["run"] == "later"
    assert common.newest(path, "nothing") is None and common.newest(tmp_path / "none", "linear") is None


def test_tables_say_where_it_loses(published, monkeypatch):
    rows = lines(published / "layers.jsonl")
    for row in rows[1:-1]:
        if row["kind"] == "linear":
            row["ms"] = {"bnbq nf4": 3.0, "torch bf16": 2.0}.get(row["contender"], 9.0)
    (published / "changed").mkdir()
    (published / "changed" / "layers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(tables, "RESULTS", published / "changed")
    text = tables.layers()
    assert rows[0]["cpu"] in text and "| 64 x 128 | nf4 | 3.0 / **0.67** |" in text
    assert (
        "bnbq nf4 is over 10% slower than the fastest at 4 of 4 points; most by 1.5 times: 64 x 128, m = 5, 1 thread, torch bf16"
        in text
    )
    for part in (tables.conversions, tables.backward, tables.call_cost):
        assert re.search(r"\| bnbq .*\|", part())


def test_plot_is_reproducible(published, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    for name in ("a", "b"):
        plot.main(["--results", str(published / "layers.jsonl"), "--out", str(tmp_path / name)])
    svg = (tmp_path / "a.svg").read_bytes()
    assert svg == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(svg) < 500_000 and (tmp_path / "a.png").stat().st_size < 300_000


# ------------------------------------------------------------------ the others


def test_kernels_times_every_row_that_runs_here(tmp_path):
    kernels.main([*TINY, "--shape", "64x128", "--out", str(tmp_path / "out.jsonl")])
    rows = lines(tmp_path / "out.jsonl")[1:-1]
    for row in rows:
        check_spread(row, "ms")
    here = {(row["family"], row["isa"]) for row in _bnbq.rows() if not row["missing"] and row["family"] != "edge"}
    assert {(row["family"], row["kernels"]) for row in rows} == here
    assert {row["operation"].split()[0] for row in rows} == {"linear", "backward", "quantize", "dequantize"}


def test_layers_runs_and_finds_cliffs(tmp_path, monkeypatch):
    layers.main([*TINY, "--shape", "64x128", "--out", str(tmp_path / "cliffs.jsonl")])
    rows = lines(tmp_path / "cliffs.jsonl")[1:-1]
    names = {row["contender"] for row in rows if row["kind"] == "cliff"}
    assert names == {f"bnbq {kind}{mode}" for kind in ("nf4", "int8") for mode in ("", " invariant")} | {*common.FLOATS}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {row["outliers"] for row in rows if row["kind"] == "outliers"} == set(contenders.OUTLIERS)
    assert "`set_batch_invariant(True)` takes" in tables.cliffs() and "| bnbq int8, m = 64 |" in tables.cliffs()

    ms = {("torch fp32", 1): 1.0, ("torch fp32", 2): 2.0, ("bnbq nf4", 1): 1.05, ("bnbq nf4", 2): 0.99}
    assert layers.violations(ms, "bf16") == []
    (cliff,) = layers.violations(ms | {("bnbq nf4", 2): 0.9}, "bf16")
    assert (cliff["m"], cliff["rule"]) == (2, "a smaller m takes longer") and 1.1 < cliff["factor"] < 1.2
    slower = ms | {("bnbq nf4", 1): 1.15, ("bnbq nf4", 2): 2.3}
    assert layers.violations(slower, "fp32") == []
    assert [row["m"] for row in layers.violations(slower, "bf16")] == [1, 2]


def test_models_measures_a_small_model_in_processes_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    models.main(
        [
            *TINY,
            "--hidden",
            "64",
            "--layers",
            "2",
            "--intermediate",
            "128",
            "--vocab",
            "128",
            "--prefill",
            "16",
            "--tokens",
            "2",
            "--only",
            "bnbq nf4",
            "--folder",
            str(tmp_path),
            "--out",
            str(tmp_path / "models.jsonl"),
        ]
    )
    rows = lines(tmp_path / "models.jsonl")[1:-1]
    assert [row["kind"] for row in rows] == ["model", "load", "prefill", "decode", "train"]
    load, prefill, decode, train = rows[1:]
    assert load["base"] > 1 << 20 and load["weights"] > 0 and train["peak"] > 0
    check_spread(load, "s")
    check_spread(prefill, "tokens_s")
    check_spread(decode, "tokens_s")
    check_spread(train, "s")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| bnbq nf4 |" in tables.models() and "| bnbq nf4 dq |" in tables.models()


def test_a_process_that_dies_is_an_error():
    worker = models.Worker("bnbq nf4")
    worker.process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError), match="bnbq nf4|Broken pipe"):
        worker.ask("forward", length=1, threads=1)
