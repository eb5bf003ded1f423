"""The emulator that the other test_cuda_* files rely on: right where a kernel is right, and not where it is wrong."""

import os
import subprocess

import pytest

import emulated_cuda as cuda

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("selftest") / "selftest"
    sources = ["tests/cuda/selftest.cpp", "tests/cuda/emulator.cpp", "cuda/runtime.cu"]
    command = [cuda.COMPILER, *cuda.FLAGS, "-fsanitize=address,undefined", "-x", "c++", *sources, "-o", path]
    subprocess.run(command, check=True, cwd=cuda.ROOT)

    def run(case, order=0):
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
        return subprocess.run([path, case, str(order)], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("order", (0, 1, 2, 3))
@pytest.mark.parametrize("case", ("fragments", "staging", "exchange", "barrier"))
def test_a_right_kernel_is_right_in_every_order(program, case, order):
    done = program(case, order)
    assert done.returncode == 0, done.stderr


def test_a_missing_barrier_shows_in_some_order(program):
    assert any(program("missing barrier", order).returncode == 1 for order in range(4))


def test_an_asynchronous_copy_is_not_there_before_it_is_waited_for(program):
    assert program("hasty").returncode == 1


@pytest.mark.parametrize(("case", "said"), [
    ("divergent barrier", "barrier that the others never reach"),
    ("beyond shared memory", "heap-buffer-overflow"),
    ("misaligned", "misaligned address"),
    ("too much shared memory", "bytes of shared memory"),
])
def test_a_fault_ends_the_run_with_its_name(program, case, said):
    done = program(case)
    assert done.returncode != 0
    assert said in done.stderr
