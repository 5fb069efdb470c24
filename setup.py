"""Builds the CPU kernel. Without a C compiler the package installs all the same and runs in plain PyTorch."""

import os
import tempfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "hf_swiglu/backends/csrc"


class BuildWithOpenMP(build_ext):
    """Uses OpenMP where the compiler has it: torch, imported first, then lends the kernel its own threads."""

    def build_extension(self, extension):
        if self._compiles("-fopenmp"):
            extension.extra_compile_args.append("-fopenmp")
            extension.extra_link_args.append("-fopenmp")
        super().build_extension(extension)

    def _compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[flag])
            except Exception:
                return False
        return True


setup(
    ext_modules=[
        Extension(
            "hf_swiglu.backends._cpu_kernels",
            sources=sorted(glob(f"{SOURCES}/*.c")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            # Products may fuse with sums; nothing else is relaxed, or the infinities would break. The scheduler, which
            # GCC leaves off on x86, mixes independent vectors: 4 to 12 % of the time (AVX-512 and AVX2, EPYC 9004).
            extra_compile_args=["-O3", "-fschedule-insns", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildWithOpenMP},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
