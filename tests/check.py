"""The one command: build, format, lint, test, and say which kernels ran.

    python tests/check.py              everything that a change must pass (about ten minutes on two cores)
    python tests/check.py --fast       without the slower halves (benchmarks, transformers, peft, sanitizers)
    python tests/check.py --slow       also the tests marked slow (needs 6 GB)
    python tests/check.py --hardening  only the sanitizer build and its tests

Needs what `pip install '.[test]'` installs and a C compiler. The extension is rebuilt in place with
-Wall -Wextra -Werror, and the tests run on that build.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What runs under AddressSanitizer and UBSan: everything that hands memory to the C core.
CORE_TESTS = ["test_quantize.py", "test_linear.py", "test_experts.py", "test_golden.py", "test_errors_core.py",
              "test_dlpack.py", "test_cuda_quantize.py", "test_cuda_linear4.py", "test_cuda_linear8.py",
              "test_cuda_binding.py"]
SLOWER_TESTS = ["test_benchmarks.py", "test_transformers.py", "test_architectures.py", "test_peft.py", "test_accelerate.py", "test_bitsandbytes_parity.py", "test_state_machine.py"]

SANITIZERS = "address,undefined"
C_SUFFIXES = (".c", ".h", ".cu", ".cuh", ".cpp")

failures = []


def run(title: str, command: list, **env) -> bool:
    """Run one step, show how long it took, remember whether it failed."""
    print(f"== {title}: {' '.join(map(str, command))}", flush=True)
    start = time.monotonic()
    code = subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, **env}).returncode
    print(f"== {title}: {'ok' if code == 0 else f'FAILED ({code})'}, {time.monotonic() - start:.0f} s", flush=True)
    if code:
        failures.append(title)
    return code == 0


def build() -> bool:
    return run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BNBQ_WERROR="1")


def format_and_lint() -> None:
    folders = [ROOT / name for name in ("csrc", "cuda", "tests/cuda")]
    c_files = [p for folder in folders for p in folder.rglob("*.*") if p.suffix in C_SUFFIXES and p.name != "dlpack.h"]
    if shutil.which("clang-format"):
        run("format", ["clang-format", "--dry-run", "-Werror", *c_files])
    else:
        print("== format: skipped, clang-format is not installed")
    run("lint", [sys.executable, "-m", "ruff", "check", "-q", "."])


def tests(arguments) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-n", "2", "--dist", "loadfile", "tests"]
    if not arguments.slow:
        command += ["-m", "not slow"]
    if arguments.fast:
        command += [f"--ignore=tests/{name}" for name in SLOWER_TESTS]
    run("tests", command, PYTHONPATH=str(ROOT / "python"))


def hardening() -> None:
    """The core's tests on a build with sanitizers, beside the normal one."""
    compiler = os.environ.get("CC", "gcc")
    # libstdc++ is preloaded too: the sanitizer must find the real __cxa_throw before torch loads it.
    preload = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
               for name in ("libasan.so", "libstdc++.so")]
    if not os.path.isabs(preload[0]):
        print(f"== hardening: skipped, {compiler} has no libasan.so")
        return
    target = ROOT / "build" / "sanitized"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "python", target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built = run("sanitizer build", [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "build/sanitized-objects",
                                    "--build-lib", target], BNBQ_SANITIZE=SANITIZERS, BNBQ_DEBUG="1", BNBQ_CUDA="0")
    log = ROOT / "build" / "sanitizer-report"
    for old in log.parent.glob(f"{log.name}*"):
        old.unlink()
    if built:
        run("sanitized tests", [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
                                *[f"tests/{name}" for name in CORE_TESTS], "-m", "not slow"],
            PYTHONPATH=str(target), LD_PRELOAD=" ".join(preload), BNBQ_SANITIZE_EMULATOR=SANITIZERS,
            ASAN_OPTIONS=f"detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:log_path={log}",
            UBSAN_OPTIONS=f"halt_on_error=1:print_stacktrace=1:log_path={log}")
        if "sanitized tests" in failures:  # pytest swallows what a dying process writes to stderr
            for report in log.parent.glob(f"{log.name}*"):
                lines = [line for line in report.read_text().splitlines() if "failed to allocate" not in line]
                print("\n".join(lines[:40]))


def kernels() -> None:
    """Which kernels this machine ran, and why it did not run the others."""
    sys.path.insert(0, str(ROOT / "python"))
    from bnbq import _bnbq

    print(f"{'family':8}{'kernels':14}{'this machine':14}why not")
    for row in _bnbq.rows():
        ran = "tested" if not row["missing"] else "skipped"
        print(f"{row['family']:8}{row['isa']:14}{ran:14}{'needs ' + ' '.join(row['missing']) if row['missing'] else ''}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--fast", "--slow", "--hardening"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    if arguments.hardening:
        hardening()
    elif build():
        format_and_lint()
        tests(arguments)
        if not arguments.fast:
            hardening()
        kernels()
    print("== " + (f"FAILED: {', '.join(failures)}" if failures else "all passed"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
