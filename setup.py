"""Builds the extension ``lhopt_fused._C``; all metadata is in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# A sanitizer build brings its own level of optimisation.
optimize = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3"]

ParallelCompile("LHOPT_BUILD_JOBS").install()

setup(
    ext_modules=[
        Pybind11Extension(
            "lhopt_fused._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            cxx_std=17,
            extra_compile_args=[*optimize, "-fno-math-errno", "-fno-trapping-math"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
