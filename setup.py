# SPDX-License-Identifier: Apache-2.0
"""Builds the native parts of pydense by driving CMake; sources and flags live in CMakeLists.txt."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPTIONS = ("PYDENSE_CUDA", "PYDENSE_CUDA_ARCHS", "PYDENSE_WERROR")  # environment -> CMake cache


def tool(name: str) -> str:
    """Path of ``name``: the one installed beside this interpreter, else the one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"pydense: building needs {name}: pip install {name}")
    return found


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


class CMakeBuild(build_ext):
    """One CMake build makes both libraries; the torch door has no Python in it."""

    def get_ext_filename(self, name: str) -> str:
        """File of an extension; the torch door is loaded by path, for any Python."""
        if name.endswith("libpydense_torch"):
            return name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds; the second extension finds its work done."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder for pip, editable and in-place builds: a rebuild compiles what changed.
        build = ROOT / "build" / sysconfig.get_config_var("SOABI")
        torch, pybind11 = package_dir("torch"), package_dir("pybind11")
        if torch is None:
            raise RuntimeError("pydense: building needs torch: pip install torch==2.13.0")
        cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if not shutil.which("nvcc") and Path(cuda_home, "bin", "nvcc").exists():
            os.environ.setdefault("CUDACXX", str(Path(cuda_home, "bin", "nvcc")))
        settings = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "PYDENSE_TORCH": "ON",
            "PYDENSE_TORCH_DIR": torch,
            "PYDENSE_NUMPY": "ON",
            "PYDENSE_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYDENSE_PYBIND11_INCLUDE": (pybind11 or torch) / "include",  # torch ships a copy
            "PYDENSE_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            **{name: os.environ[name] for name in OPTIONS if name in os.environ},
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        # The build folder is kept: an option of an earlier build must not stick.
        definitions += [f"-U{name}" for name in OPTIONS if name not in settings]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        cmake = tool("cmake")
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension(f"pydense.{name}", []) for name in ("_core", "libpydense_torch")],
    cmdclass={"build_ext": CMakeBuild},
)
