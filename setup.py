"""Build of bnbq._bnbq. KERNELS is the build table: which source is compiled with which flags.

Needs setuptools, numpy and a C11 compiler (gcc >= 11 or clang >= 12); no torch, no nvcc.
Environment:
    BNBQ_WERROR=1                     warnings are errors
    BNBQ_DEBUG=1                      keep asserts
    BNBQ_SANITIZE=address,undefined   sanitizers, -g -O1, asserts
    BNBQ_CUDA=0|1|auto                auto (default): cuda/*.cu if nvcc is found, else cuda/stub.c
    BNBQ_CUDA=emulate                 for tests only: cuda/*.cu for the CPU, by $CXX, with the emulator of tests/cuda;
                                      "CUDA" tensors must then lie in the CPU's memory
    BNBQ_CUDA_ARCHS="80;90"           compute capabilities, default CUDA_ARCHS
    BNBQ_JOBS=2                       compilers at once, default: all processors
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VNNI = [*AVX512, "-mavx512vnni"]
BF16 = [*VNNI, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]

KERNELS = {
    "any": {"edge_scalar": [], "q4_scalar": [], "s8_scalar": [], "w4a8_scalar": []},
    "x86_64": {
        "edge_avx2": AVX2,
        "q4_avx2": AVX2,
        "q4_avx512": AVX512,
        "q4_avx512bf16": BF16,
        "q4_amx": AMX,
        "s8_avx2": AVX2,
        "s8_avx512vnni": VNNI,
        "s8_avx512bf16": BF16,
        "s8_amx": AMX,
        "w4a8_avx2": AVX2,
        "w4a8_avx512vnni": VNNI,
    },
    "aarch64": {
        "q4_neon": [],
        "q4_neon_bf16": ["-march=armv8.2-a+bf16"],
        "s8_neon": ["-march=armv8.2-a+dotprod"],
        "s8_neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    },
}
FLAGS = ["-std=c11", "-fno-wrapv", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
CUDA_ARCHS = "75;80;86;89;90a;100;120"

ROOT = Path(__file__).resolve().parent
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has none


def switch(name):
    return os.environ.get(name, "0") not in ("", "0")


def cuda_sources():
    """(compiler, sources): nvcc, or for an emulation the C++ compiler; (None, []) for a build with the stub."""
    wanted = os.environ.get("BNBQ_CUDA", "auto")
    if wanted not in ("0", "1", "auto", "emulate"):
        raise PlatformError(f"BNBQ_CUDA is {wanted!r}, wanted 0, 1, auto or emulate")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    files = sorted(glob("cuda/*.cu", root_dir=ROOT))
    if wanted == "emulate":
        return os.environ.get("CXX", "g++"), [*files, "tests/cuda/emulator.cpp"]
    if wanted == "1" and not nvcc:
        raise PlatformError("BNBQ_CUDA=1, but there is no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    if wanted == "1" and not files:
        raise PlatformError("BNBQ_CUDA=1, but this source tree has no CUDA kernels (cuda/*.cu)")
    return (nvcc, files) if wanted != "0" and nvcc and files else (None, [])


class BuildExt(build_ext):
    """Gives every source its own flags, compiles in parallel and only what has changed."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # build_extension below decides, from every header and flag

    def build_extension(self, ext):
        if self.compiler.compiler_type != "unix":
            raise PlatformError("bnbq is built with gcc or clang")
        import numpy

        sanitize = os.environ.get("BNBQ_SANITIZE", "")
        debug = switch("BNBQ_DEBUG") or bool(sanitize)
        # After Python's own flags, which may say -DNDEBUG and -fwrapv: the latter hides overflows from UBSan, and
        # with it gcc 12 spills the accumulators of s8_avx512vnni (twice the time at m = 256).
        common = FLAGS + (["-g", "-O1", f"-fsanitize={sanitize}"] if sanitize else ["-O3", "-g0"])
        common += ["-UNDEBUG" if debug else "-DNDEBUG"]
        common += ["-Werror"] if switch("BNBQ_WERROR") else []
        version = self.distribution.get_version()
        binding = [f'-DBNBQ_VERSION="{version}"', f'-DBNBQ_SANITIZE="{sanitize}"', f"-I{numpy.get_include()}"]
        binding += ["-DPy_LIMITED_API=0x030A0000"] if LIMITED_API else []

        machine = subprocess.check_output([self.compiler.compiler_so[0], "-dumpmachine"], text=True).split("-")[0]
        kernels = KERNELS["any"] | KERNELS.get({"arm64": "aarch64"}.get(machine, machine), {})
        flags = dict.fromkeys(sorted(glob("csrc/*.c")), common)
        flags |= dict.fromkeys(sorted(glob("csrc/binding/*.c")), common + binding)
        flags |= {f"csrc/kernels/{name}.c": common + own for name, own in kernels.items()}
        cuda, cu_files = cuda_sources()
        emulate = "tests/cuda/emulator.cpp" in cu_files
        flags |= {} if cuda else {"cuda/stub.c": common}

        headers = [*glob("csrc/**/*.h", recursive=True), *glob("cuda/*.h"), *glob("cuda/*.cuh")]
        headers += glob("tests/cuda/*.h") if emulate else []
        newest = max(os.path.getmtime(h) for h in headers)
        jobs = [(lambda s=s, f=f: self.compile_c(s, f, newest)) for s, f in flags.items()]
        compile_cuda = self.compile_emulated if emulate else self.compile_cuda
        jobs += [(lambda s=s: compile_cuda(cuda, s, newest)) for s in cu_files]
        with ThreadPoolExecutor(int(os.environ.get("BNBQ_JOBS") or os.cpu_count())) as pool:
            objects = [f.result() for f in [pool.submit(job) for job in jobs]]

        target = self.get_ext_fullpath(ext.name)
        link = ["-pthread", *([f"-fsanitize={sanitize}"] if sanitize else []), *(["-lstdc++"] if emulate else [])]
        if cuda and not emulate:  # knows where its static runtime is
            self.mkpath(os.path.dirname(target))
            host = [word for flag in link for word in ("-Xcompiler", flag)]
            subprocess.check_call([cuda, "-shared", "-cudart", "static", *host, *objects, "-ldl", "-o", target])
        else:
            self.compiler.link_shared_object(
                objects, target, libraries=self.get_libraries(ext), extra_postargs=[*link, "-ldl"],
                build_temp=self.build_temp, target_lang="c",
            )

    def compile_c(self, source, flags, newest):
        try:
            return self.compile_one(source, flags, newest, lambda out: self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=["csrc", *self.include_dirs], extra_postargs=flags))
        except CompileError as error:
            raise CompileError(f"{source}: {error} (bnbq needs gcc >= 11 or clang >= 12)") from None

    def compile_cuda(self, nvcc, source, newest):
        archs = os.environ.get("BNBQ_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";")
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc", "-Icuda"]
        flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        flags += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX, for what comes after it
        flags += [f'-DBNBQ_CUDA_ARCHS="{" ".join("sm_" + a for a in archs)}"']
        flags += ["--compress-mode=size", "-Xptxas", "-v"]
        flags += ["-Werror", "all-warnings"] if switch("BNBQ_WERROR") else []

        def run(out):
            done = subprocess.run([nvcc, *flags, "-c", source, "-o", out], capture_output=True, text=True)
            Path(out).with_suffix(".ptxas").write_text(done.stderr)  # registers and spills, for the tests
            messages = [line for line in done.stderr.splitlines(True) if "ptxas info" not in line]
            sys.stderr.writelines(line for line in messages if "bytes stack frame" not in line and line.strip())
            if done.returncode:
                raise CompileError(f"{source}: nvcc failed")

        return self.compile_one(source, flags, newest, run)

    def compile_emulated(self, compiler, source, newest):
        sanitize = os.environ.get("BNBQ_SANITIZE", "")
        flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-pthread", "-DBNBQ_EMULATE"]
        flags += ["-Icsrc", "-Icuda", "-Itests/cuda", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
                  "-Wno-missing-field-initializers"]
        # A GPU does not read 16 bytes from where they are not aligned, so neither may this.
        alignment = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        flags += ["-g", "-O1", f"-fsanitize={sanitize}"] if sanitize else ["-O2", "-g0", *alignment]
        flags += ["-Werror"] if switch("BNBQ_WERROR") else []
        flags += ["-x", "c++"]
        return self.compile_one(source, flags, newest, lambda out: subprocess.check_call(
            [compiler, *flags, "-c", source, "-o", out]))

    def compile_one(self, source, flags, newest, run):
        """Run unless the object is newer than its source, every header and this file, with the same flags."""
        target = Path(self.build_temp, source).with_suffix(".o")
        stamp = target.with_suffix(".flags")
        wanted = hashlib.sha256("\0".join([sys.version, *flags]).encode()).hexdigest()
        newest = max(newest, os.path.getmtime(source), os.path.getmtime(__file__))
        if not (target.exists() and stamp.exists() and stamp.read_text() == wanted
                and os.path.getmtime(target) > newest):
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            run(str(target))
            stamp.write_text(wanted)
        return str(target)


os.chdir(ROOT)
c_files = [f for d in ("csrc", "cuda") for f in glob(f"{d}/**/*.[ch]*", recursive=True)]
setup(
    # All of them: what an sdist must contain. What is compiled is decided above.
    ext_modules=[Extension("bnbq._bnbq", sources=sorted(c_files), py_limited_api=LIMITED_API)],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
