"""What `import bnbq` does, and what it does not do: each test is a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

import bnbq
from bnbq import _bnbq


def python(code: str, *flags: str) -> str:
    """Standard output of the code; anything on standard error fails."""
    run = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout.strip()


def test_import_is_silent_and_loads_nothing():
    """No torch, no extension, no thread, nothing that numpy has not loaded already but a handful of small modules."""
    code = """
import sys, threading, numpy
before = set(sys.modules)
import bnbq
new = {name for name in set(sys.modules) - before if not name.startswith("bnbq")}
print(sorted(new & {"torch", "transformers", "subprocess", "socket", "asyncio", "json", "typing", "ctypes"}))
print(threading.active_count(), "bnbq._bnbq" in sys.modules, len(new) < 50)
"""
    assert python(code, "-W", "error").splitlines() == ["[]", "1 False True"]


def test_import_takes_at_most_15_ms_on_top_of_numpy():
    """The least of five processes: other work on the machine only ever adds."""
    code = "import numpy, time; start = time.process_time(); import bnbq; print(time.process_time() - start)"
    python(code)  # writes the bytecode
    assert min(float(python(code)) for _ in range(5)) < 0.015


def test_numpy_alone_is_enough():
    code = """
import sys
sys.modules["torch"] = None  # import torch raises ImportError
import numpy as np
from bnbq import ops
w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
packed = ops.quantize_4bit(w, double_quant=True)
y = ops.linear4bit(np.ones((2, 64), np.float16), *packed[:2], 8, absmax2=packed[2], absmax_offset=packed[3])
z = ops.linear8bitlt(np.ones((2, 64), np.float32), *ops.quantize_8bit(w))
print(y.dtype, y.shape, z.dtype, bool(abs(y - z).max() < 3))
"""
    assert python(code) == "float16 (2, 8) float32 True"


def test_its_quantiser_may_be_imported_before_transformers():
    pytest.importorskip("transformers", minversion="5.0")
    code = """
from bnbq.integrations.transformers import BnbqQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["bnbq"] is BnbqQuantizer)
"""
    assert python(code) == "True"


@pytest.mark.parametrize("order", ["import torch; from bnbq import ops", "from bnbq import ops; import torch"])
def test_torch_may_be_imported_before_or_after(order):
    code = order + """
w = torch.randn(8, 64)
packed = ops.quantize_4bit(w)
x = torch.randn(2, 64, requires_grad=True)
ops.linear4bit(x, *packed[:2], 8).sum().backward()
print(x.grad.shape, torch.compile(ops.linear4bit, backend="eager", fullgraph=True)(x, *packed[:2], 8).shape)
"""
    assert python(code) == "torch.Size([2, 64]) torch.Size([2, 8])"


def test_first_call_inside_compile():
    code = """
from bnbq import ops
import torch, numpy
qweight, absmax = map(torch.from_numpy, ops.quantize_4bit(numpy.ones((8, 64), numpy.float32))[:2])
f = torch.compile(lambda x: ops.linear4bit(x, qweight, absmax, 8), backend="eager")
print(f(torch.ones(2, 64)).sum().item())
"""
    assert python(code) == "1024.0"


def test_public_names():
    assert set(bnbq.__all__) <= set(dir(bnbq))
    for name in bnbq.__all__:
        assert getattr(bnbq, name) is not None
    with pytest.raises(AttributeError, match="module 'bnbq' has no attribute 'nonsense'"):
        bnbq.nonsense  # noqa: B018


def test_report_is_the_function_even_after_its_module_was_imported():
    code = "import bnbq; import bnbq.report; from bnbq.report import report; print(bnbq.report is report)"
    assert python(code) == "True"
    code = "import bnbq; bnbq.explain; print(callable(bnbq.report))"
    assert python(code) == "True"


def test_star_import_and_unknown_submodule():
    assert python("from bnbq import *; print(ops.__name__, nn.__name__)") == "bnbq.ops bnbq.nn"
    assert python("try: import bnbq.nonsense\nexcept ModuleNotFoundError as e: print(e)") == "No module named 'bnbq.nonsense'"


def test_one_version():
    assert _bnbq.build_info()["version"] == bnbq.__version__
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if pyproject.exists():
        assert 'version = { attr = "bnbq.__version__" }' in pyproject.read_text()


def test_the_extension_uses_the_stable_abi():
    if sys.platform == "linux" and sys.version_info < (3, 14):
        assert _bnbq.__file__.endswith(".abi3.so")


def test_build_info_and_rows_are_complete():
    info = _bnbq.build_info()
    assert set(info) == {"version", "compiler", "cuda", "cuda_archs", "sanitize", "asserts"}
    rows = _bnbq.rows()
    assert {row["family"] for row in rows} == {"edge", "q4", "s8", "w4a8"}
    for family in ("edge", "q4", "s8", "w4a8"):
        assert [row["in_use"] for row in rows if row["family"] == family].count(True) == 1
    for row in rows:
        assert set(row["missing"]) <= set(row["needs"])
        assert set(row["needs"]) - set(row["missing"]) <= set(_bnbq.cpu_features())
        assert (row["level"] in _bnbq.isas()) or row["missing"]


def test_set_isa_caps_every_family(isa):
    order = ["scalar", "neon", "i8mm", "neonbf16", "avx2", "avx512", "avx512bf16", "amx"]
    assert _bnbq.isa() == isa
    for row in _bnbq.rows():
        if row["in_use"]:
            assert order.index(row["level"]) <= order.index(isa)


def test_types_are_declared_for_every_function():
    stub = (Path(bnbq.__file__).parent / "_bnbq.pyi").read_text()
    for name in dir(_bnbq):
        if not name.startswith("__"):
            assert f"def {name}(" in stub or f"\n{name}: Final" in stub, name
    assert (Path(bnbq.__file__).parent / "py.typed").exists()


def test_fork_keeps_the_extension_usable():
    """A child of a process whose threads have run must not wait for threads that it does not have."""
    code = """
import os
import numpy as np
from bnbq import ops
w = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
x = np.ones((64, 1024), np.float32)
packed = ops.quantize_4bit(w)
y = ops.linear4bit(x, *packed[:2], 512)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(ops.linear4bit(x, *packed[:2], 512), y) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0"


def test_subinterpreters_do_not_crash():
    """NumPy refuses to be imported a second time; that must stay an exception."""
    code = """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
import bnbq._bnbq
other = interpreters.create()
try:
    interpreters.run_string(other, "import bnbq._bnbq")
except Exception as error:
    pass
print("alive")
"""
    pytest.importorskip("_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters")
    assert python(code).endswith("alive")
