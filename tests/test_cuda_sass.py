"""What the kernels became for compute capability 9.0: tensor core instructions, load widths, instructions per weight.

Needs an extension built with nvcc, and cuobjdump with nvdisasm: of a CUDA toolkit, or of the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from bnbq import _bnbq

ARCH = "90a"
PLACES = [os.environ.get("PATH", ""), *map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")), "/usr/local/cuda/bin"]
CUOBJDUMP = shutil.which("cuobjdump", path=os.pathsep.join(PLACES))

pytestmark = [
    pytest.mark.skipif(f"sm_{ARCH}" not in (_bnbq.build_info()["cuda_archs"] or ""), reason=f"not built for sm_{ARCH}"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
    pytest.mark.skipif(not shutil.which("c++filt"), reason="no c++filt"),
]


class Line(NamedTuple):
    address: int
    operation: str
    target: int | None  # of a branch


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Line]]:
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(CUOBJDUMP).parent), *PLACES])}
    command = [CUOBJDUMP, "-sass", "-arch", f"sm_{ARCH}", _bnbq.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    mangled, bodies = (re.split(r"\n\s+Function : (\S+)\n", text)[start::2] for start in (1, 2))
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
    found = {}
    for name, body in zip(names.splitlines(), bodies, strict=True):
        name = re.match(r"(?:void )?(\w+(?:<.*>)?)\(", name.replace("(anonymous namespace)::", ""))[1]
        lines = []
        for address, operation, operands in pattern.findall(body):
            branch = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
            lines.append(Line(int(address, 16), operation, int(branch[1], 16) if branch else None))
        found[name] = lines
    return found


def count(lines: list[Line], operation: str) -> int:
    return sum(bool(re.match(operation, line.operation)) for line in lines)


def main_loop(lines: list[Line], operation: str) -> list[Line]:
    """The shortest loop with the most of these instructions."""
    loops = [[line for line in lines if end.target <= line.address <= end.address]
             for end in lines if end.target is not None and end.target < end.address]
    return max(loops, key=lambda loop: (count(loop, operation), -len(loop)))


def test_nothing_lives_in_local_memory(kernels):
    assert kernels
    assert not {name: lines for name, lines in kernels.items() if count(lines, "LDL|STL")}


# Instructions per weight, as counted when they were written, and a tenth.
PER_WEIGHT = {(8, 1): 2.53, (8, 2): 2.03, (16, 1): 3.0, (16, 2): 2.45, (32, 1): 3.4}


@pytest.mark.parametrize("dtype", [1, 2], ids=["bf16", "f16"])
@pytest.mark.parametrize(("tokens", "tiles"), PER_WEIGHT)
def test_few_rows_cost_few_instructions_per_weight(kernels, tokens, tiles, dtype):
    loop = main_loop(kernels[f"q4_mma_kernel<(bnbq_dtype){dtype}, {tokens}, {tiles}, false, false>"], "HMMA")
    weights = count(loop, "HMMA") // (tokens // 8) * 8  # a lane has 8 of the 256 of an A fragment
    assert weights >= 64
    assert len(loop) / weights <= PER_WEIGHT[tokens, tiles] * 1.1
    assert count(loop, r"LDG\.E\.NA.*\.64") > 0  # 8 bytes of weights at a time
    assert count(loop, r"SHFL") == 0


def test_many_rows_are_mostly_tensor_core_work(kernels):
    for dtype in (1, 2):
        loop = main_loop(kernels[f"q4_mma_kernel<(bnbq_dtype){dtype}, 64, 2, false, false>"], "HMMA")
        assert count(loop, "HMMA") == 64
        assert len(loop) / 64 <= 4.5 * 1.1
        assert count(loop, r"LDGSTS.*\.128") > 0


@pytest.mark.parametrize("tokens", [64, 128])
def test_warpgroup_products_are_used(kernels, tokens):
    for bf16 in ("true", "false"):
        loop = main_loop(kernels[f"q4_wgmma_kernel<{bf16}, false, {tokens}>"], "HGMMA")
        assert count(loop, "HGMMA") == 4
        assert len(loop) <= 270
        assert count(loop, r"LDGSTS.*\.128") > 0


def test_int8_products_are_used(kernels):
    loop = main_loop(kernels["wgmma_tiles_kernel"], "IGMMA")
    assert count(loop, "IGMMA") == 4
    assert count(loop, r"LDGSTS.*\.128") == 8
    for tokens in (1, 2, 4, 8):
        lines = kernels[f"few_kernel<{tokens}, false, false>"]
        assert count(lines, "IMMA") == 8 * tokens
        assert count(lines, r"LDG\.E\.NA.*\.128") >= 16  # 16 bytes of weights at a time, several in flight
    loop = main_loop(kernels["tiles_kernel<false, 4>"], "IMMA")
    assert count(loop, "IMMA") == 64
    assert len(loop) <= 163 * 1.1


@pytest.mark.parametrize("dtype", [0, 1, 2], ids=["f32", "bf16", "f16"])
def test_weights_are_moved_in_wide_accesses(kernels, dtype):
    assert count(kernels[f"dequantize4_kernel<(bnbq_dtype){dtype}>"], r"STG\.E\.128") == 4
    assert count(kernels[f"quantize4_kernel<(bnbq_dtype){dtype}>"], r"LDG\.E\.NA.*\.128") == 4
    assert count(kernels[f"dequantize8_kernel<(bnbq_dtype){dtype}>"], r"STG\.E\.128") == 4
    assert count(kernels[f"quantize8_kernel<(bnbq_dtype){dtype}, 8>"], r"LDG\.E\.NA.*\.128") == 10
