"""Kernel tables against the scalar ones in C, without Python in between: guard pages around every buffer.

checkasm.c is compiled with the files of one instruction set. AMX is checked twice on processors without it: with
the tile instructions as plain C (amx_tiles.h), and as machine code whose tile instructions are trapped and emulated
(amx_trap.c). NEON is cross-compiled and runs under qemu. Every program also reads the golden vectors.
"""

import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from bnbq import reference as ref
from cases import FORMATS, formula

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "csrc" / "kernels"
CC = os.environ.get("CC", "gcc")
CROSS_CC = "aarch64-linux-gnu-gcc"
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VNNI = [*AVX512, "-mavx512vnni"]
BF16 = [*VNNI, "-mavx512bf16"]
AMX = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
SCALAR = {"edge_scalar": [], "q4_scalar": [], "s8_scalar": [], "w4a8_scalar": []}
BORROWED = {"q4_avx512": AVX512, "s8_avx512vnni": VNNI}  # by the tables of BF16 and AMX

pytestmark = pytest.mark.skipif(not KERNELS.is_dir(), reason="no sources here (an installed package)")


def skip_unless_cpu_has(*wanted):
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", flags=re.M)
    missing = sorted(set(wanted) - set(flags[1].split() if flags else ()))
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")


def skip_unless_found(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def skip_unless_compiler_knows(compiler, flags):
    command = [compiler, *flags, "-x", "c", "-fsyntax-only", os.devnull]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{compiler} does not know {' '.join(flags)}")


def run(command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


compiled = {}


def compile_object(folder, compiler, source, flags):
    """Each file is compiled once for all tests that link it the same way."""
    key = (folder, compiler, source, *flags)
    if key not in compiled:
        target = folder / f"{len(compiled)}-{source.stem}.o"
        run([compiler, *FLAGS, *flags, "-c", source, "-o", target])
        compiled[key] = target
    return compiled[key]


def build(folder, name, files, q4, s8, w4a8="w4a8_scalar", compiler=CC, extra=(), sources=()):
    """checkasm for tables `q4`, `s8` and `w4a8`; `files` are kernel files with their flags. Returns the program."""
    for stem in files:
        if not (KERNELS / f"{stem}.c").exists():
            pytest.skip(f"no {stem}.c in this source tree")
    sources = [*((KERNELS / f"{stem}.c", flags) for stem, flags in {**SCALAR, **files}.items()), *sources]
    objects = [compile_object(folder, compiler, source, flags) for source, flags in sources]
    program = folder / name
    run([compiler, *FLAGS, "-O2", f"-DCHECK_Q4=bnbq_{q4}", f"-DCHECK_S8=bnbq_{s8}", f"-DCHECK_W4A8=bnbq_{w4a8}",
         *extra, TESTS / "checkasm.c", KERNELS.parent / "formats.c", *objects, "-lm", "-o", program])
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkasm")


def golden_vectors():
    """(format, blocksize, values, codes, absmax, what they decode to), a block at a time for int8."""
    for name in FORMATS:
        stored = json.loads((TESTS / "golden" / f"{name}.json").read_text())
        w = formula(**stored["input"])
        for row in stored["vectors"]:
            codes, absmax = bytes.fromhex(row["qweight"]), np.frombuffer(bytes.fromhex(row["absmax"]), "<f4")
            dense = ref.dequantize_4bit(np.frombuffer(codes, np.uint8), absmax, w.shape, name, row["blocksize"])
            assert zlib.crc32(dense.tobytes()) == row["dense_crc32"]
            yield name, row["blocksize"], w, codes, absmax, dense
    stored = json.loads((TESTS / "golden" / "int8.json").read_text())
    n, k = stored["input"]["shape"]
    w = formula(n * k, stored["input"]["seed"]).reshape(n, k)
    for row in stored["vectors"]:
        codes = np.frombuffer(bytes.fromhex(row["qweight"]), np.int8).reshape(n, k)
        absmax = np.frombuffer(bytes.fromhex(row["absmax"]), "<f4").reshape(n, -1)
        dense = ref.dequantize_8bit(codes, absmax if row["blocksize"] else absmax[:, 0], row["blocksize"])
        for block, columns in enumerate(ref.column_blocks(k, row["blocksize"])):
            for r in range(n):
                yield "int8", k, w[r, columns], codes[r, columns].tobytes(), absmax[r, block], dense[r, columns]


@pytest.fixture(scope="module")
def golden(folder):
    """The golden vectors as checkasm reads them."""
    path = folder / "golden"
    with path.open("wb") as file:
        for name, blocksize, w, codes, absmax, dense in golden_vectors():
            file.write(struct.pack("<8sqq", name.encode(), blocksize, w.size))
            file.write(w.tobytes() + codes + absmax.tobytes() + dense.tobytes())
    return path


def test_the_check_accepts_scalar(folder, golden):
    skip_unless_found(CC)
    assert "cases equal scalar" in run([build(folder, "scalar", {}, "q4_scalar", "s8_scalar"), golden])


def test_avx2(folder, golden):
    skip_unless_found(CC)
    skip_unless_cpu_has("avx2", "fma", "f16c")
    files = {"q4_avx2": AVX2, "s8_avx2": AVX2, "w4a8_avx2": AVX2}
    output = run([build(folder, "avx2", files, "q4_avx2", "s8_avx2", "w4a8_avx2"), golden])
    assert "q4 avx2" in output and "w4a8 avx2" in output


def test_avx512(folder, golden):
    skip_unless_found(CC)
    skip_unless_cpu_has("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    files = {**BORROWED, "w4a8_avx512vnni": VNNI}
    output = run([build(folder, "avx512", files, "q4_avx512", "s8_avx512vnni", "w4a8_avx512vnni"), golden])
    assert "q4 avx512" in output and "w4a8 avx512vnni" in output


def test_avx512bf16(folder, golden):
    skip_unless_found(CC)
    skip_unless_compiler_knows(CC, BF16)
    skip_unless_cpu_has("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
    files = {**BORROWED, "q4_avx512bf16": BF16, "s8_avx512bf16": BF16}
    program = build(folder, "avx512bf16", files, "q4_avx512bf16", "s8_avx512bf16")
    assert "q4 avx512bf16" in run([program, golden])


def skip_unless_amx_can_be_emulated():
    skip_unless_found(CC)
    skip_unless_compiler_knows(CC, BF16)
    skip_unless_cpu_has("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")


def test_amx_with_tiles_in_c(folder, golden):
    skip_unless_amx_can_be_emulated()
    emulated = [*BF16, "-DBNBQ_AMX_EMULATED"]
    files = {**BORROWED, "s8_avx512bf16": BF16, "q4_amx": emulated, "s8_amx": emulated}
    program = build(folder, "amx-c", files, "q4_amx", "s8_amx")
    assert "q4 amx (needs 0xf)" in run([program, golden])  # without the bit of AMX


@pytest.fixture(scope="module")
def amx_program(folder):
    skip_unless_amx_can_be_emulated()
    skip_unless_compiler_knows(CC, AMX)
    files = {**BORROWED, "s8_avx512bf16": BF16, "q4_amx": BF16 + AMX, "s8_amx": BF16 + AMX}
    return build(folder, "amx", files, "q4_amx", "s8_amx",
                 extra=["-DCHECK_TILES_RELEASED"], sources=[(TESTS / "amx_trap.c", BF16)])


def test_amx_machine_code(amx_program, golden):
    """The compiler's output, its tile instructions trapped unless this processor has them."""
    output = run([amx_program, golden])
    assert "q4 amx (needs 0x1f)" in output
    assert "this processor's" in output or int(re.search(r"(\d+) instructions trapped", output)[1]) > 10000


def test_amx_files_use_the_tile_instructions(amx_program):
    skip_unless_found("objdump")
    for stem, product in (("q4_amx", "tdpbf16ps"), ("s8_amx", "tdpbssd")):
        target = compile_object(amx_program.parent, CC, KERNELS / f"{stem}.c", BF16 + AMX)
        code = run(["objdump", "-d", target])
        for instruction in (product, "ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored"):
            assert instruction in code, f"{instruction} is not in {stem}"


def test_amx_emulation_itself(folder):
    """Order of rounding, denormals, shapes; and each wrong use aborts instead of computing something."""
    skip_unless_amx_can_be_emulated()
    program = folder / "amx_emulator"
    run([CC, *FLAGS, *BF16, TESTS / "amx_emulator.c", "-lm", "-o", program])
    misuses = int(run([program]))
    assert misuses > 10
    run([program, "0"])
    for number in range(1, misuses + 1):
        result = subprocess.run([program, str(number)], capture_output=True, text=True)
        assert result.returncode == -signal.SIGABRT and "AMX emulation: #" in result.stderr, (number, result)


NEON = {"q4_neon": [], "s8_neon": ["-march=armv8.2-a+dotprod"]}
# Files beside those of NEON, the tables to check, the features they need.
ARM = {
    "neon": ({}, "q4_neon", "s8_neon", []),
    "i8mm": ({"s8_neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}, "q4_neon", "s8_neon_i8mm", ["i8mm"]),
    "neonbf16": ({"q4_neon_bf16": ["-march=armv8.2-a+bf16"]}, "q4_neon_bf16", "s8_neon", ["bf16"]),
}


@pytest.mark.parametrize("isa", ARM)
def test_arm(folder, golden, isa):
    files, q4, s8, needs = ARM[isa]
    if platform.machine() in ("aarch64", "arm64"):
        skip_unless_found(CC)
        if needs:
            skip_unless_cpu_has(*needs)
        command = [build(folder, isa, NEON | files, q4, s8), golden]
    else:
        qemu = "qemu-aarch64" if shutil.which("qemu-aarch64") else "qemu-aarch64-static"
        skip_unless_found(CROSS_CC, qemu)
        program = build(folder, isa, NEON | files, q4, s8, compiler=CROSS_CC, extra=["-static"])
        command = [qemu, "-cpu", "max", program, golden, 1, 60]  # a seed, and fewer random cases
    assert re.search(rf"(q4|s8) {isa} ", run(command))
