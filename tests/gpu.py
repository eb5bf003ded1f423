"""On a machine with a GPU, in one command and about ten minutes: build, test, check memory accesses, measure.

    python tests/gpu.py [--skip build tests sanitizer benchmark] [--out FOLDER] [--arch 90a]

Builds the extension in place for the GPU at hand, runs tests/test_gpu.py and `bnbq doctor`, then a few small cases
under compute-sanitizer (memcheck, racecheck), then benchmarks/gpu.py. Logs and gpu.jsonl go to the folder. Needs
nvcc, torch with CUDA, NumPy, setuptools and pytest; bitsandbytes is measured beside if it is installed. What is absent
is skipped with its reason. The exit status is that of what ran.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "tests", "sanitizer", "benchmark")
# One case of each kernel: compute-sanitizer slows a kernel down up to a thousand times.
SMALL_CASES = ["test_bytes_of_4_bits_are_those_of_the_cpu and 127 and 64", "test_bytes_of_8_bits_are_those_of_the_cpu and 127",
               "test_linear4bit and 320 and (1- or 33- or 129-)", "test_linear8bitlt and 320 and (1- or 33- or 129-)",
               "test_blocks_that_cross_rows"]

failed, skipped = [], []


def step(name: str, command: list, folder: Path, seconds: int, **env: str) -> None:
    """Run, keep the log, show its end."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1", **env}
    with (folder / f"{name.replace(' ', '-')}.log").open("w+") as log:
        try:
            code = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = f"not done after {seconds} s"
        log.seek(0)
        print("".join(log.readlines()[-40:]))
    print(f"== {name}: {'ok' if code == 0 else code}, {time.monotonic() - start:.0f} s", flush=True)
    if code != 0:
        failed.append(name)


def skip(name: str, reason: str) -> None:
    print(f"== {name}: skipped, {reason}", flush=True)
    skipped.append(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", nargs="*", choices=STEPS, default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--arch", help="compute capability to build for; default: that of the GPU")
    parser.add_argument("--quick", action="store_true", help="one shape in the benchmark")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    import torch

    if not torch.cuda.is_available():
        print("== skipped: torch sees no GPU")
        return 0
    arch = arguments.arch
    if arch is None:
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}{minor}" + ("a" if major == 9 else "")
    print(f"{torch.cuda.get_device_name()}, sm_{arch}, torch {torch.__version__}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "tests/test_gpu.py"]

    if "build" not in arguments.skip:
        step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder, 400, BNBQ_CUDA="1", BNBQ_CUDA_ARCHS=arch)
        if failed:
            return 1
    if "tests" not in arguments.skip:
        xdist = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        step("tests", [*pytest, *xdist], folder, 240)
        step("doctor", [sys.executable, "-m", "bnbq", "doctor"], folder, 60)
    if "sanitizer" not in arguments.skip:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        for kind in ("memcheck", "racecheck"):
            if tool is None:
                skip(f"compute-sanitizer {kind}", "it is not installed")
                continue
            command = [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all", "--launch-timeout", "60", *pytest]
            step(f"compute-sanitizer {kind}", [*command, "-k", " or ".join(f"({case})" for case in SMALL_CASES)], folder, 150)
    if "benchmark" not in arguments.skip:
        if importlib.util.find_spec("bitsandbytes") is None:
            print("== bitsandbytes is not installed: measured without it")
        quick = ["--quick"] if arguments.quick else []
        step("benchmark", [sys.executable, "-m", "benchmarks.gpu", "--out", folder / "gpu.jsonl", "--rounds", "3", *quick], folder, 280)
    print(f"== {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}" + (f"; skipped: {', '.join(skipped)}" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
