# SPDX-License-Identifier: Apache-2.0
"""What people install: sdist, wheel, editable and in-place builds, and the shipped binaries.

``pytest tests/test_packaging.py`` looks at the pydense that is installed (seconds);
``pytest -m packaging`` builds and installs in fresh environments (minutes), with one build shared
by all tests that can. README's two commands, which CI runs, cover the isolated builds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import _packaging as packaging
import pytest
from _packaging import ROOT, SCRIPTS, pip, run

CORE = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
DOORS = ("libpydense_torch.so", CORE)
WHEEL_LIMIT = 25e6  # bytes
SYSTEM_LIBRARIES = {
    *("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0"),
    *("libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git clone")


@dataclass
class Build:
    """A source tree and what was built in it."""

    source: Path
    wheel: Path | None = None

    @property
    def folder(self) -> Path:
        return self.source / "build" / sysconfig.get_config_var("SOABI")


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "packaging" not in request.config.option.markexpr:
        pytest.skip("slow, run with -m packaging")
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="session")
def sdist(workshop: Path) -> Path:
    tree = packaging.copy_tree(workshop / "clone", packaging.project_files())
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", workshop]
    run(command, tree)
    (archive,) = workshop.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def built(workshop: Path, sdist: Path) -> Build:
    """The wheel of the unpacked sdist, with cmake from pip and, where there is nvcc, with CUDA."""
    with tarfile.open(sdist) as archive:
        archive.extractall(workshop / "unpacked")
    (source,) = (workshop / "unpacked").iterdir()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", workshop]
    run(command, source)
    (wheel,) = workshop.glob("*.whl")
    return Build(source, wheel)


@pytest.fixture(scope="session")
def unpacked_wheel(workshop: Path, built: Build) -> Path:
    assert built.wheel
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(workshop / "wheel")
    return workshop / "wheel"


@pytest.fixture(params=["installed", pytest.param("wheel", marks=pytest.mark.packaging)])
def binaries(request: pytest.FixtureRequest) -> Path:
    """Folder with the shipped libraries."""
    if request.param == "wheel":
        return Path(request.getfixturevalue("unpacked_wheel")) / "pydense"
    spec = importlib.util.find_spec("pydense")
    assert spec and spec.origin
    return Path(spec.origin).parent


class TestBinaries:
    def test_only_stable_torch_symbols_are_undefined(self, binaries):
        """C functions of torch's stable interface and versioned system symbols, nothing else."""
        system = re.compile(r"^(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
        optional = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
        symbols = packaging.undefined_symbols(binaries / "libpydense_torch.so")
        stable = {name for name in symbols if re.match(r"^(aoti_torch|torch)_[a-z0-9_]+$", name)}
        assert "aoti_torch_library_init_fragment" in stable
        others = {name: v for name, v in symbols.items() if name not in stable | optional}
        assert [name for name, v in others.items() if not system.match(v)] == []

    def test_numpy_door_needs_python_and_the_system_only(self, binaries):
        symbols = packaging.undefined_symbols(binaries / CORE)
        unversioned = [name for name, v in symbols.items() if not v]
        assert "PyModuleDef_Init" in unversioned or "PyModule_Create2" in unversioned
        foreign = re.compile(r"^(?!_?Py[A-Z_]|_ITM_|__gmon_start__)")
        assert [name for name in unversioned if foreign.match(name)] == []

    def test_linked_libraries(self, binaries):
        for name in DOORS:
            section = packaging.dynamic_section(binaries / name)
            torch = {"libtorch_cpu.so"} if name == "libpydense_torch.so" else set()
            assert set(section["NEEDED"]) - SYSTEM_LIBRARIES == torch
            runpath = section.get("RUNPATH", []) + section.get("RPATH", [])
            assert runpath == (["$ORIGIN/../torch/lib"] if torch else [])

    def test_no_build_paths_inside(self, binaries, request):
        places = {str(ROOT), str(Path.home()), sysconfig.get_path("purelib"), "/pip-"}
        if "workshop" in request.fixturenames or "wheel" in request.node.name:
            places.add(str(request.getfixturevalue("workshop")))
        for name in DOORS:
            content = (binaries / name).read_bytes()
            assert [place for place in places if place.encode() in content] == []


@needs_git
@pytest.mark.packaging
class TestSdist:
    def names(self, sdist: Path) -> list[str]:
        with tarfile.open(sdist) as archive:
            return [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]

    def test_holds_all_that_building_needs(self, sdist):
        top = {"CMakeLists.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md"}
        folders = ("csrc/", "cmake/", "pydense/", "tests/cpp/")
        needed = {n for n in packaging.project_files() if n in top or n.startswith(folders)}
        assert top | {"pydense/py.typed", "pydense/_core.pyi"} <= needed
        assert needed - set(self.names(sdist)) == set()

    def test_holds_no_pictures_and_no_binaries(self, sdist):
        unwanted = {".png", ".jpg", ".jpeg", ".ppm", ".npz", ".npy", ".so", ".o", ".pyc"}
        assert [n for n in self.names(sdist) if Path(n).suffix in unwanted] == []
        assert sdist.stat().st_size < 2e6


@needs_git
@pytest.mark.packaging
class TestWheel:
    def test_contents(self, built, unpacked_wheel, capsys):
        size = built.wheel.stat().st_size
        with capsys.disabled():
            print(f"\n{built.wheel.name}: {size / 1e6:.2f} MB (limit {WHEEL_LIMIT / 1e6:.0f} MB)")
        assert size <= WHEEL_LIMIT
        names = {p.relative_to(unpacked_wheel).as_posix() for p in unpacked_wheel.rglob("*")}
        names = {name for name in names if (unpacked_wheel / name).is_file()}
        package = {n for n in packaging.project_files() if n.startswith("pydense/")}
        package |= {f"pydense/{door}" for door in DOORS}
        assert {n for n in names if ".dist-info/" not in n} == package
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
        assert f"cp{sys.version_info.major}{sys.version_info.minor}" in built.wheel.name

    def test_no_instructions_leak_between_isas(self, built):
        print(run([sys.executable, ROOT / "tools" / "check_isa.py", built.folder], ROOT).stdout)

    def test_torch_abi_audit_agrees(self, unpacked_wheel):
        path = os.pathsep.join([SCRIPTS, os.environ.get("PATH", "")])
        audit = shutil.which("torch-abi-audit", path=path)
        if audit is None:
            pytest.skip("torch-abi-audit is not installed")
        library = unpacked_wheel / "pydense" / "libpydense_torch.so"
        command = [audit, "--check", "torch", library]
        report = run(command, library.parent).stdout
        assert re.search(r"Torch ABI: +STABLE", report), report
        assert re.search(r"Min torch: +2\.11\.0", report), report

    def test_numpy_door_works_without_torch(self, workshop, built):
        python = packaging.new_venv(workshop / "venv-numpy")
        pip(python, "install", "numpy")
        pip(python, "install", "--no-deps", built.wheel)
        code = """
import importlib.util, sys
import numpy as np
import pydense, pydense.densecrf as dcrf
for name in ("torch", "PIL", "rich"):
    assert importlib.util.find_spec(name) is None, name
rng = np.random.default_rng(0)
crf = dcrf.DenseCRF2D(12, 9, 3)
crf.setUnaryEnergy(rng.random((3, 108), dtype=np.float32))
crf.addPairwiseGaussian(sxy=3, compat=3)
crf.addPairwiseBilateral(sxy=5, srgb=9, rgbim=rng.integers(0, 255, (9, 12, 3), np.uint8), compat=4)
q = np.asarray(crf.inference(5))
assert q.shape == (3, 108) and np.abs(q.sum(axis=0) - 1).max() < 1e-5
from pydense import _library
assert _library.state().startswith("torch is not installed"), _library.state()
try:
    _library.load()
except ImportError as error:
    print(error)
"""
        printed = run([python, "-c", code], workshop).stdout
        assert "pip install torch" in printed

    @pytest.fixture(scope="class")
    def program(self, workshop, built):
        """The command, with torch in a fresh environment."""
        python = packaging.new_venv(workshop / "venv-torch")
        release = version("torch").partition("+")[0]
        pip(python, "install", f"torch=={release}", built.wheel)
        return python.parent / "pydense"

    def test_predict_on_a_real_picture_in_a_fresh_environment(self, workshop, program, pictures):
        name, camvid = "0001TP_008550", pictures.resolve() / "camvid"
        out = workshop / "predicted.png"
        truth = camvid / "testannot" / f"{name}.png"
        weights = ROOT / "checkpoints" / "camvid_unet8.safetensors"
        call = [program, "predict", camvid / "test" / f"{name}.jpg"]
        call += ["--checkpoint", weights, "-o", out, "--truth", truth, "--threads", "1"]
        printed = run(call, workshop).stdout
        assert "labelled 1 of 1 pictures" in printed and "frames/s" in printed
        accuracy = re.search(r"pixel accuracy ([0-9.]+)", printed)
        assert accuracy and float(accuracy[1]) > 60, printed
        assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    def test_selftest_passes_with_torch_in_a_fresh_environment(self, workshop, program):
        release = version("torch").partition("+")[0]
        printed = run([program, "info", "--selftest", "--json"], workshop).stdout
        report = json.loads(printed[printed.index("{") :])
        assert [check for check in report["selftest"] if not check["ok"]] == []
        (torch,) = (c for c in report["selftest"] if c["name"].startswith(f"torch {release}"))
        assert torch["detail"] == "exact"
        assert Path(report["torch_library"]).is_relative_to(workshop / "venv-torch")
        has_nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
        assert bool(report["cuda_architectures"]) == bool(has_nvcc)
        assert run([program, "info", "--selftest"], workshop).returncode == 0


@pytest.fixture(scope="session")
def other_tools(workshop: Path) -> dict[str, str]:
    """An environment for builds with the system's cmake and no nvcc."""
    if not Path("/usr/bin/cmake").exists():
        pytest.skip("no system cmake in /usr/bin")
    tools = workshop / "tools"
    tools.mkdir()
    ninja = shutil.which("ninja", path=os.pathsep.join([SCRIPTS, os.environ.get("PATH", "")]))
    assert ninja, "ninja is missing: pip install ninja"
    (tools / "ninja").symlink_to(ninja)
    return {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_HOME": str(workshop / "nowhere")}


@pytest.fixture(scope="session")
def editable(workshop: Path, other_tools: dict[str, str]) -> Build:
    """An editable, non-isolated install of a clone, with the system's cmake and without nvcc."""
    source = packaging.copy_tree(workshop / "editable", packaging.project_files())
    python = packaging.new_venv(workshop / "venv-editable", borrow=True)
    command = ("install", "--no-build-isolation", "--no-deps", "-e", source)
    pip(python, *command, **other_tools)
    return Build(source)


@needs_git
@pytest.mark.packaging
class TestEditable:
    def test_imports_from_the_tree_without_cuda(self, workshop, editable):
        cache = (editable.folder / "CMakeCache.txt").read_text()
        assert re.search(r"^CMAKE_COMMAND:INTERNAL=/usr/bin/cmake$", cache, re.M)
        python = workshop / "venv-editable" / "bin" / "python"
        code = "import json, pydense; print(json.dumps(pydense.build_info()))"
        info = json.loads(run([python, "-c", code], workshop).stdout)
        assert Path(info["torch_library"]) == editable.source / "pydense" / "libpydense_torch.so"
        assert not info["cuda_architectures"]
        code = "from pydense import _library as l; print([r for r in l.selftest() if not r.ok])"
        assert run([python, "-c", code], workshop).stdout.splitlines()[-1] == "[]"

    def test_one_changed_file_is_one_compilation(self, workshop, editable, other_tools):
        python = workshop / "venv-editable" / "bin" / "python"
        command = [python, "setup.py", "build_ext", "--inplace"]

        def compiled() -> list[str]:
            printed = run(command, editable.source, **other_tools).stdout
            return re.findall(r"Building \w+ object \S*?\.dir/(\S+)\.o$", printed, re.M)

        assert compiled() == []
        changed = editable.source / "csrc" / "dense_crf" / "mean_field.cpp"
        changed.write_text(changed.read_text() + "// changed\n")
        assert compiled() == ["csrc/dense_crf/mean_field.cpp"]


@pytest.mark.packaging
class TestBuildOptions:
    def configure(self, folder: Path, *options: str, **changes: str) -> tuple[bool, str]:
        command = ["/usr/bin/cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options]
        done = run(command, folder.parent, check=False, **changes)
        return done.returncode == 0, done.stdout

    def test_auto_without_nvcc_is_cpu_only(self, tmp_path, other_tools):
        ok, printed = self.configure(tmp_path / "auto", **other_tools)
        assert ok and "building CPU kernels only" in printed, printed

    def test_on_without_nvcc_is_refused(self, tmp_path, other_tools):
        ok, printed = self.configure(tmp_path / "on", "-DPYDENSE_CUDA=ON", **other_tools)
        assert not ok and "no working nvcc was found" in printed, printed

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
    def test_system_cmake_compiles_cuda(self, tmp_path, other_tools):
        path = {"PATH": f"{other_tools['PATH']}:{os.environ['PATH']}"}
        ok, printed = self.configure(tmp_path / "cuda", "-DPYDENSE_CUDA=AUTO", **path)
        assert ok and "building CPU + CUDA kernels" in printed, printed
        targets = run(["ninja", "-t", "targets", "all"], tmp_path / "cuda", **path).stdout
        objects = re.findall(r"^(\S+\.cu\.o): ", targets, re.M)
        assert objects
        run(["ninja", *objects], tmp_path / "cuda", **path)
        ok, printed = self.configure(tmp_path / "off", "-DPYDENSE_CUDA=OFF", **path)
        assert ok and "building CPU kernels only" in printed, printed

    @pytest.mark.parametrize(("max_jobs", "jobs"), [("3", "3"), ("1", "1")])
    def test_max_jobs_reaches_the_build(self, tmp_path, workshop, max_jobs, jobs):
        needed = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pydense/__init__.py")
        tree = packaging.copy_tree(tmp_path / "tree", needed)
        python = packaging.new_venv(tmp_path / "venv", borrow=True)
        for name in ("cmake", "ninja"):  # recorders: only the command line is of interest
            program = python.parent / name
            program.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/{name}.log"\n')
            program.chmod(0o755)
        command = [python, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
        run(command, tree, MAX_JOBS=max_jobs, PYDENSE_CUDA="OFF", PYDENSE_CUDA_ARCHS="90a-real")
        lines = (tmp_path / "cmake.log").read_text().splitlines()
        builds = [line for line in lines if line.startswith("--build")]
        assert builds and all(line.endswith(f"--parallel {jobs}") for line in builds)
        settings = [line for line in lines if not line.startswith("--build")]
        assert settings
        assert all("-DPYDENSE_CUDA=OFF -DPYDENSE_CUDA_ARCHS=90a-real" in line for line in settings)


@pytest.mark.packaging
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_options_of_an_earlier_build_do_not_stick(workshop: Path) -> None:
    """The build folder is kept, so setup.py unsets (-U) every option that is not asked for."""
    configure = ["cmake", "-S", ROOT, "-B", workshop / "sticky", "-G", "Ninja"]
    without = run([*configure, "-DPYDENSE_CUDA=OFF"], workshop).stdout
    again = run([*configure, "-UPYDENSE_CUDA"], workshop).stdout
    assert "building CPU kernels only" in without
    assert "building CPU + CUDA kernels" in again
