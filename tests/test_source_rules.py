"""Rules of the house that a reader relies on, checked on the sources themselves."""

import re
from pathlib import Path

import pytest

from bnbq import reference as ref

ROOT = Path(__file__).parent.parent
C_FILES = sorted(p for folder in ("csrc", "cuda") for p in (ROOT / folder).rglob("*") if p.suffix in (".c", ".h", ".cu", ".cuh"))
PYTHON_FILES = sorted(p for folder in ("python", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
KERNELS = sorted((ROOT / "csrc" / "kernels").glob("*.c"))
BASELINE = list((ROOT / "csrc").glob("*.c"))

pytestmark = pytest.mark.skipif(not KERNELS, reason="no sources here (an installed package)")


def names(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


def code(path: Path) -> str:
    """The file without comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)


@pytest.mark.parametrize("path", C_FILES + PYTHON_FILES, ids=names(C_FILES + PYTHON_FILES))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 800


@pytest.mark.parametrize("path", C_FILES, ids=names(C_FILES))
def test_only_the_binding_knows_python(path):
    if path.parent.name != "binding":
        assert not re.search(r"Python\.h|PyObject|numpy/", path.read_text())


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_kernels_only_compute(path):
    text = code(path)
    assert not re.search(r"\b(malloc|calloc|realloc|free|printf|fprintf|abort|exit|pthread_\w+|omp_\w+)\s*\(", text)
    includes = set(re.findall(r'#include "([^"]+)"', text))
    private = {p.name for p in path.parent.glob("*.h")}
    assert includes <= private | {f"../{name}" for name in ("kernels.h", "formats.h", "float16.h", "cpu.h", "bnbq.h")}, includes


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_one_kernel_file_exports_one_table(path):
    family, isa = path.stem.split("_", 1)
    tables = re.findall(r"^const bnbq_(edge|q4|s8|w4a8)_kernels bnbq_(\w+) =", code(path), flags=re.M)
    assert tables == [(family, f"{family}_{isa}")], tables
    exported = list(re.findall(r"^(?!static|typedef|#|extern)[a-z][\w ]*[ *](\w+)\(", code(path), flags=re.M))
    assert not exported, f"functions that are not static: {exported}"


@pytest.mark.parametrize("path", [p for p in KERNELS if not p.stem.endswith("scalar")], ids=lambda p: p.stem)
def test_kernel_files_refuse_a_build_without_their_flags(path):
    assert re.search(r"#if[^\n]*(?:\n[^\n]*){0,4}#error", path.read_text())


@pytest.mark.parametrize("path", BASELINE + [p for p in KERNELS if p.stem.endswith("scalar")], ids=lambda p: p.stem)
def test_baseline_files_refuse_a_build_with_isa_flags(path):
    """A stray -mavx2 would make the whole library die of SIGILL on an older processor."""
    assert re.search(r"#if(def| defined\(?) ?\(?__AVX2?__|BASELINE", path.read_text()), path


def test_codebooks_are_written_once():
    """One fact, one place: formats.c has the literals, reference.py computes them."""
    literals = ["0.69619", "0.52507", "0.0795803", "0.00520833", "0x1.647", "0x1.0cd", "0x1.555"]
    offenders = [str(p.relative_to(ROOT)) for p in C_FILES + PYTHON_FILES
                 if p.name not in ("formats.c", Path(__file__).name) and any(x in code(p) for x in literals)]
    assert not offenders


def test_formats_c_holds_what_the_specification_computes():
    import numpy as np

    text = code(ROOT / "csrc" / "formats.c")
    number = r"-?(?:0x[\d.a-fA-F]+p[+-]?\d+|\d+(?:\.\d*)?(?:e[+-]?\d+)?)f?"
    for fmt in ref.FORMATS.values():
        row = text[text.index(f'"{fmt.name}"'):]
        values = [v.rstrip("f") for v in re.findall(number, row.split('"', 2)[2])]
        parsed = np.array([float.fromhex(v) if "0x" in v else float(v) for v in values[:47]])
        assert np.array_equal(parsed[:16].astype(np.float32), fmt.codebook), fmt.name
        assert np.array_equal(parsed[16:31].astype(np.float32), fmt.thresholds), fmt.name
        assert np.array_equal(parsed[31:47].astype(np.uint8), fmt.order), fmt.name


def test_every_table_is_built_registered_and_documented():
    setup, registry, readme = ((ROOT / name).read_text() for name in ("setup.py", "csrc/registry.c", "README.md"))
    for path in KERNELS:
        assert path.stem in setup, f"{path.stem} is not in setup.py's build table"
        assert f"bnbq_{path.stem}" in registry, f"{path.stem} is not registered"
        assert path.stem in readme, f"{path.stem} is not in the README's table of kernels"
    for fmt in ref.FORMATS:
        assert fmt in readme


def test_no_wildcard_or_debugging_leftovers():
    for path in PYTHON_FILES:
        text = path.read_text()
        assert not re.search(r"^\s*(breakpoint\(\)|import pdb|from \S+ import \*)", text, flags=re.M), path
        if path.name != Path(__file__).name:
            assert "TODO" not in text and "FIXME" not in text, path
