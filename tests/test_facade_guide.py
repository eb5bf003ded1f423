"""The migration guide's examples run as printed, in order, in one session; and its package is part of what is installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnbq

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "migrating.md"


@pytest.mark.skipif(not GUIDE.exists(), reason="no sources here (an installed package)")
def test_examples_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session, examples = {}, re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.S | re.M)
    assert len(examples) == 4
    for example in examples:
        if "sys.modules" in example:
            continue  # test_facade_downstream.py has processes of their own for it
        exec(compile(example, str(GUIDE), "exec"), session)
    printed = capsys.readouterr().out
    assert "torch.Size([4, 64])" in printed
    assert "quant_type=nf4" in printed and "threshold=6.0" in printed  # native layers


def test_bnbq_does_not_import_the_facade():
    code = """
import sys, bnbq, torch
bnbq.nn, bnbq.ops, bnbq.report, bnbq.BnbqConfig
print([name for name in sys.modules if name.startswith("bnbq.bitsandbytes")])
import bnbq.bitsandbytes as bnb
print(bnb.nn.Linear4bit.__name__, "bitsandbytes" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert (run.stderr, run.stdout.split("\n")[:2]) == ("", ["[]", "Linear4bit False"])


def test_the_package_is_installed_with_its_folders():
    setuptools = pytest.importorskip("setuptools")
    found = set(setuptools.find_packages(Path(bnbq.__file__).parent.parent, include=["bnbq*"]))
    assert {"bnbq.bitsandbytes", "bnbq.bitsandbytes.nn", "bnbq.bitsandbytes.autograd"} <= found
