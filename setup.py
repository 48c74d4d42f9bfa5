"""The compiled kernels, one library per instruction set, without a header of torch or of Python.

All are optional: where there is no compiler, or none that knows the flags, the package installs without them and
computes by PyTorch's operators. All else about the package is in pyproject.toml.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("widerf/kernels/csrc")
FLAGS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS["avx2"] = ["-mavx2", "-mfma"]
    FLAGS["avx512"] = ["-mavx512f", "-mavx2", "-mfma"]


class Build(build_ext):
    """Exports what the sources export: ctypes loads the libraries, they are no Python modules."""

    def get_export_symbols(self, ext):
        """Return the names to export beside those, on Windows: no ``PyInit``."""
        return ext.export_symbols


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            f"widerf.kernels._{name}",
            sources=[str(SOURCES / f"{name}.cpp")],
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread", *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in FLAGS.items()
    ],
)
