"""What nvcc made of cuda/: registers and spills per kernel and architecture against a committed budget.

    python tests/test_cuda_build.py --write    take the last build's figures as the budget

The figures are those that setup.py kept of ptxas beside the objects. A kernel may not spill at all, nor need more
than SLACK registers above its budget; what is new or gone must be written down.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = ROOT / "tests" / "cuda" / "registers.txt"
SLACK = 8
MOST_BYTES = 6 << 20


def reports() -> list[Path]:
    """Of the in-place build, the newest one."""
    folders = sorted((p for p in ROOT.glob("build/temp.*/cuda") if list(p.glob("*.ptxas"))), key=lambda p: p.stat().st_mtime)
    names = {p.stem for p in (ROOT / "cuda").glob("*.cu")}
    return [p for p in sorted(folders[-1].glob("*.ptxas")) if p.stem in names] if folders else []


def measured() -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {architecture: (registers, bytes of stack and spills)}}"""
    pattern = re.compile(r"entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                         r"(\d+) bytes spill loads.*?Used (\d+) registers", re.S)
    found = [match for path in reports() for match in pattern.findall(path.read_text())]
    mangled = [match[0] for match in found]
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout.splitlines()
    kernels: dict[str, dict[str, tuple[int, int]]] = {}
    for name, (_, arch, *spills, registers) in zip(names, found, strict=True):
        name = name.replace("(anonymous namespace)::", "")
        name = re.match(r"(?:void )?(\w+(?:<.*>)?)\(", name)[1]  # template arguments may hold parentheses too
        kernels.setdefault(name, {})[arch] = int(registers), sum(map(int, spills))
    return kernels


def budget() -> dict[str, dict[str, int]]:
    lines = [line.rpartition(" | ") for line in BUDGET.read_text().splitlines()]
    return {name.strip(): {arch: int(count) for arch, count in (pair.split(":") for pair in counts.split())}
            for name, _, counts in lines}


def write() -> None:
    rows = {name: " ".join(f"{arch}:{count}" for arch, (count, _) in sorted(archs.items(), key=lambda a: int(a[0].rstrip("a"))))
            for name, archs in measured().items()}
    width = max(map(len, rows))
    BUDGET.write_text("".join(f"{name:{width}} | {counts}\n" for name, counts in sorted(rows.items())))


needs_build = pytest.mark.skipif(not reports() or not shutil.which("c++filt"), reason="this tree was not built with nvcc")


@pytest.fixture(scope="module")
def kernels():
    return measured()


@needs_build
def test_no_kernel_spills(kernels):
    assert not {(name, arch): spills for name, archs in kernels.items() for arch, (_, spills) in archs.items() if spills}


@needs_build
def test_every_kernel_has_a_budget(kernels):
    known = budget()
    assert sorted(kernels) == sorted(known)
    unknown = {name: sorted(set(archs) - set(known[name])) for name, archs in kernels.items() if set(archs) - set(known[name])}
    assert not unknown


@needs_build
def test_no_kernel_grows_unnoticed(kernels):
    known = budget()
    grown = {(name, arch): (count, known[name][arch]) for name, archs in kernels.items() for arch, (count, _) in archs.items()
             if count > known.get(name, {}).get(arch, 0) + SLACK}
    assert not grown, "registers (now, budget)"


@needs_build
def test_the_extension_stays_small():
    extension = max((ROOT / "python" / "bnbq").glob("_bnbq*.so"), key=lambda p: p.stat().st_mtime)
    assert extension.stat().st_size <= MOST_BYTES


@needs_build
def test_the_extension_needs_no_driver():
    """cudart is linked statically and finds the driver when it is first asked for."""
    extension = max((ROOT / "python" / "bnbq").glob("_bnbq*.so"), key=lambda p: p.stat().st_mtime)
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    needed = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*?)\]", needed)
    assert libraries
    assert not [name for name in libraries if re.search(r"cuda|cublas|nvrtc|torch", name)]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
