"""The command line: arguments, exit codes, one-line errors; `doctor` and `report`."""

import json
import os
import subprocess
import sys

import pytest

from bnbq import _bnbq, cli, doctor
from processes import ENVIRONMENT


def bnbq(*arguments, **environment):
    """Run ``python -m bnbq``."""
    return subprocess.run(
        [sys.executable, "-m", "bnbq", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
    )


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, (out, err)
    return err


# ------------------------------------------------------------------ arguments


def test_help_names_every_command():
    done = bnbq("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "quantize", "convert", "report", "doctor"))
    assert bnbq().returncode == 2


@pytest.mark.parametrize("command", ["demo", "quantize", "convert", "report", "doctor"])
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantise"], "invalid choice: 'quantise'"),
        (["quantize", "a"], "required: DST"),
        (["quantize", "a", "b", "--format", "nf5"], "invalid choice: 'nf5'"),
        (["quantize", "a", "b", "--max-shard-size", "many"], "'many' is not a size such as 5GB"),
        (["demo", "--windows", "0"], "'0' is not a positive number"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("text, wanted", [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("1000", 1000), ("2kb", 2000)])
def test_sizes(text, wanted):
    assert cli.size(text) == wanted


def test_version():
    done = bnbq("--version")
    assert done.returncode == 0 and done.stdout.startswith("bnbq ")


def test_the_command_line_is_cheap_to_import():
    heavy = ["torch", "transformers", "numpy", "rich", "tqdm"]
    code = f"import sys; from bnbq import cli; cli.parser(); print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize(
    "error, code, text",
    [
        (cli.UserError("no such thing"), 2, "bnbq doctor: no such thing\n"),
        (ValueError("two\n  lines"), 2, "bnbq doctor: two lines (BNBQ_TRACEBACK=1 shows where)\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "bnbq doctor: [Errno 2] No such file: 'x'\n"),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            2,
            "bnbq doctor: this command needs the package gguf, which is not installed\n",
        ),
        (KeyboardInterrupt(), 130, "bnbq: interrupted\n"),
    ],
)
def test_errors_become_a_line_and_a_code(error, code, text, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.delenv("BNBQ_TRACEBACK", raising=False)
    monkeypatch.setattr(doctor, "main", fail)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == text


def test_traceback_on_demand(tmp_path):
    quiet, loud = bnbq("report", tmp_path), bnbq("report", tmp_path, BNBQ_TRACEBACK="1")
    assert quiet.returncode == loud.returncode == 2
    assert quiet.stderr.count("\n") == 1 and "not a checkpoint" in quiet.stderr
    assert "Traceback" in loud.stderr and loud.stderr.endswith(quiet.stderr)


def test_a_closed_pipe_is_silent():
    command = f'"{sys.executable}" -m bnbq doctor | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stderr == ""


# ------------------------------------------------------------------ doctor


def test_doctor_runs_every_kernel_of_this_machine():
    before = os.times()
    done = bnbq("doctor", "--json")
    after = os.times()
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["ok"] and facts["seconds"] > 0
    assert after.children_user - before.children_user < 5  # not the wall's: other tests may run beside this one
    assert {(test["isa"], test["family"]) for test in facts["self_test"]} == {
        (i, f) for i in _bnbq.isas() for f in ("edge", "q4", "s8", "w4a8")
    }
    assert {row["isa"] for row in facts["kernels"]} == {row["isa"] for row in _bnbq.rows()}
    assert facts["threads"]["count"] >= 1 and facts["packages"]["numpy"]
    assert all(row["in_use"] or row["why"].startswith("not used: ") for row in facts["kernels"])


def test_doctor_for_people(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in ("Python 3", "CPU:", "CUDA:", "threads:", "self test", "all is well"):
        assert words in text
    assert "FAILED" not in text


class Broken:
    """The extension with one kernel that is wrong."""

    def __init__(self, name, damage):
        self.name, self.damage = name, damage

    def __getattr__(self, name):
        real = getattr(_bnbq, name)
        if name != self.name:
            return real

        def broken(*arguments):
            real(*arguments)
            self.damage(*arguments)

        return broken


@pytest.mark.parametrize(
    "name, damage, family",
    [
        ("quantize_4bit", lambda w, q, *_: q.reshape(-1).__setitem__(3, q.reshape(-1)[3] ^ 16), "q4"),
        ("linear4bit", lambda x, q, a, a2, o, b, y, *_: y.__setitem__((0, 2), y[0, 2] + 0.01), "q4"),
        ("linear4bit", lambda x, q, a, a2, o, b, y, *_: y.__setitem__((0, 2), y[0, 2] + 0.01), "w4a8"),
        ("linear4bit_backward", lambda gy, q, a, a2, o, y, *_: y.__setitem__((0, 2), float("nan")), "q4"),
        ("linear8bitlt", lambda x, q, a, b, y, *_: y.__setitem__((0, 2), y[0, 2] + 0.01), "s8"),
    ],
)
def test_doctor_notices_a_wrong_kernel(name, damage, family):
    chosen = _bnbq.isa()
    results = doctor.self_test(Broken(name, damage))
    assert not any(r["ok"] for r in results if r["family"] == family)
    assert all(r["error"] for r in results if r["family"] == family)
    assert _bnbq.isa() == chosen


def test_doctor_fails_with_code_1(monkeypatch, capsys):
    bad = [
        {
            "isa": "scalar",
            "family": "q4",
            "kernel": "scalar",
            "ok": False,
            "error": "ArithmeticError: nf4 codes: 1 of 320 differ",
        }
    ]
    monkeypatch.setattr(doctor, "self_test", lambda _: bad)
    assert cli.main(["doctor"]) == 1
    assert "FAILED: ArithmeticError: nf4 codes: 1 of 320 differ" in capsys.readouterr().out


def test_doctor_says_why_a_kernel_is_not_used():
    def row(isa, missing=(), in_use=False):
        return {"family": "q4", "isa": isa, "level": isa, "needs": (isa,), "missing": missing, "in_use": in_use}

    rows = [row("scalar"), row("avx2", in_use=True), row("avx512"), row("amx", missing=("amx",))]
    assert [r["why"] for r in doctor.explain(rows)] == [
        "not used: a faster one is",
        "in use",
        "not used: capped by BNBQ_ISA or set_isa",
        "not used: this CPU lacks amx",
    ]


# ------------------------------------------------------------------ quantize and report


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A float Llama and what ``bnbq quantize`` makes of it."""
    pytest.importorskip("transformers")
    import small_models

    folder = tmp_path_factory.mktemp("checkpoints")
    small_models.llama(folder / "float")
    for name, extra in (
        ("nf4", []),
        ("nf4-dq", ["--double-quant", "--skip", "k_proj", "v_proj"]),
        ("int8", ["--format", "int8"]),
        ("bnb", ["--format", "fp4", "--checkpoint-format", "bitsandbytes"]),
        ("bnb8", ["--format", "int8", "--checkpoint-format", "bitsandbytes"]),
    ):
        assert cli.main(["quantize", str(folder / "float"), str(folder / name), *extra]) == 0
    return folder


def test_quantize_from_the_shell(checkpoints, tmp_path):
    done = bnbq(
        "quantize",
        checkpoints / "float",
        tmp_path / "out",
        "--format",
        "int4",
        "--blocksize",
        "32",
        "--compute-dtype",
        "float32",
        "--max-shard-size",
        "40KB",
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("\n") == 1 and "14 of 15 linear layers" in done.stdout and "kept: lm_head" in done.stdout
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_type"], settings["blocksize"], settings["compute_dtype"]) == ("int4", 32, "float32")
    again = bnbq("quantize", checkpoints / "float", tmp_path / "out")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "--force" in again.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "int8", "--double-quant"], "double_quant"),
        (["--format", "int4", "--checkpoint-format", "bitsandbytes"], "bitsandbytes has no int4"),
        (["--blocksize", "48"], "blocksize: got 48"),
        (["--skip", "no_such_module"], "no_such_module"),
    ],
)
def test_quantize_refuses_settings_that_make_no_sense(checkpoints, tmp_path, capsys, arguments, message):
    assert cli.main(["quantize", str(checkpoints / "float"), str(tmp_path / "out"), *arguments]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, form, count, low, high",
    [
        ("nf4", "nf4", 14, 4.5, 0.15),
        ("nf4-dq", "nf4+dq", 10, 4.0, 0.15),
        ("int8", "int8", 14, 8.0, 0.02),
        ("bnb", "fp4", 14, 4.5, 0.2),
        ("bnb8", "int8", 14, 8.0, 0.02),
    ],
)
def test_report(checkpoints, capsys, name, form, count, low, high):
    assert cli.main(["report", str(checkpoints / name), "--against", str(checkpoints / "float"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["totals"]["layers"] == count == len(facts["layers"])
    family = "s8_" if form == "int8" else "q4_"
    for row in facts["layers"]:
        assert row["format"] == form and row["kernel"].startswith(family)
        assert low <= row["bits"] < low + (2.5 if "bnb" in name else 1.1)
        assert 0 < row["error"] < high and row["snr"] > 10
    assert {tuple(row["shape"]) for row in facts["layers"]} <= {(64, 64), (32, 64), (128, 64), (64, 128)}


def test_report_equals_the_error_of_the_layers(checkpoints, capsys):
    """Against the same figures from models in memory."""
    transformers = pytest.importorskip("transformers")
    cli.main(["report", str(checkpoints / "nf4"), "--against", str(checkpoints / "float"), "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    dense = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "float")
    packed = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "nf4")
    for name, row in rows.items():
        weight = dense.get_submodule(name).weight.detach().double()
        layer = packed.get_submodule(name)
        other = layer.dequantize(dtype=layer.absmax.dtype).double()
        assert row["error"] == pytest.approx(((weight - other).norm() / weight.norm()).item(), rel=1e-6)
        assert row["nbytes"] == layer.qweight.nbytes + layer.absmax.nbytes


@pytest.mark.parametrize("name, saved", [("nf4", "hf"), ("nf4", "own"), ("nf4-dq", "hf"), ("int8", "own")])
def test_report_counts_side_branches(checkpoints, tmp_path, capsys, name, saved):
    """Bytes and bits are of all that the layer has in the file, and its weight is compared with its branch."""
    transformers = pytest.importorskip("transformers")
    import torch

    import bnbq as library
    from bnbq.side_branch import attach

    dense = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "float")
    packed = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / name)
    layer, weight = packed.model.layers[0].mlp.up_proj, dense.model.layers[0].mlp.up_proj.weight.detach().double()
    attach(layer, torch.randn(3, 64) / 20, torch.randn(128, 3) / 20)
    packed.save_pretrained(tmp_path) if saved == "hf" else library.save(packed, tmp_path)
    assert cli.main(["report", str(tmp_path), "--against", str(checkpoints / "float"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in facts["layers"]}
    row = rows.pop("model.layers.0.mlp.up_proj")
    assert row["side_rank"] == 3 and not any(other["side_rank"] for other in rows.values())
    assert row["nbytes"] == sum(parameter.nbytes for parameter in layer.parameters())
    assert row["bits"] == pytest.approx(8 * row["nbytes"] / weight.numel())
    error = (weight - layer.dequantize(torch.float32).double()).norm() / weight.norm()
    assert row["error"] == pytest.approx(error.item(), rel=1e-5)
    totals, files = facts["totals"], sum(p.nbytes for p in packed.state_dict().values())
    assert totals["bytes"] == row["nbytes"] + sum(other["nbytes"] for other in rows.values())
    assert totals["bytes"] + totals["other_bytes"] == files
    assert not any("side_branch" in name for name in totals["largest_other"])
    assert cli.main(["report", str(tmp_path)]) == 0
    assert " + rank 3 " in capsys.readouterr().out


def test_report_for_people(checkpoints, capsys):
    assert cli.main(["report", str(checkpoints / "nf4")]) == 0
    text = capsys.readouterr().out
    assert (
        "model.layers.1.mlp.down_proj" in text
        and "nf4/64" in text
        and "14 quantised layers" in text
        and "error" not in text
    )
    assert cli.main(["report", str(checkpoints / "nf4"), "--against", str(checkpoints / "float")]) == 0
    assert "SNR dB" in capsys.readouterr().out


def test_report_of_what_bnbq_save_wrote(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    import bnbq as package

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    package.quantize_model(model)
    package.save(model, tmp_path / "saved")
    assert cli.main(["report", str(tmp_path / "saved"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [(row["name"], row["shape"], row["kernel"]) for row in rows][1] == ("2", [8, 40], "generic")
    assert rows[0]["shape"] == [32, 64]


def test_report_of_conv1d_and_flat_layers(tmp_path, capsys):
    pytest.importorskip("transformers")
    import small_models

    small_models.gpt2(tmp_path / "gpt2")
    small_models.llama(tmp_path / "odd", hidden_size=60, intermediate_size=99, num_attention_heads=2, head_dim=30)
    for name in ("gpt2", "odd"):
        assert cli.main(["quantize", str(tmp_path / name), str(tmp_path / f"{name}-q")]) == 0
        capsys.readouterr()
        assert cli.main(["report", str(tmp_path / f"{name}-q")]) == 0
        assert ("  flat  " in capsys.readouterr().out) == (name == "odd")
        assert cli.main(["report", str(tmp_path / f"{name}-q"), "--against", str(tmp_path / name), "--json"]) == 0
        assert all(0.05 < row["error"] < 0.15 for row in json.loads(capsys.readouterr().out)["layers"])


def test_report_refuses_what_is_no_quantised_checkpoint(checkpoints, tmp_path, capsys):
    for path, message in (
        (tmp_path, "not a checkpoint"),
        (tmp_path / "none", "not a directory"),
        (checkpoints / "float", "not quantised"),
    ):
        assert cli.main(["report", str(path)]) == 2
        assert message in one_line(capsys)
    assert cli.main(["report", str(checkpoints / "nf4"), "--against", str(tmp_path)]) == 2
    assert "no model.safetensors" in one_line(capsys)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "quantised by gptq" in one_line(capsys)
