"""The shipped package: sdist, wheel and editable install, the library's imports, and the errors of a broken set-up."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    *(".*cache", ".git", ".hypothesis", ".venv", "*.egg-info", "*.so", "__pycache__", "build", "dist", "out")
)

USE = """
import sys, torch, custom_ops, importlib.util as u
x = torch.tensor([-1.0, 2.0], requires_grad=True)
custom_ops.relu(x).sum().backward()
assert x.grad.tolist() == [0.0, 1.0]
spec = u.find_spec("custom_ops.triton_kernels")
print(spec.origin if spec else "the Triton kernels are missing")
assert "triton" not in sys.modules
print(custom_ops.__file__)
"""


def call(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def succeed(*command: str | Path, cwd: Path, **env: str) -> str:
    done = call(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def closure(*names: str) -> Iterator[importlib.metadata.Distribution]:
    """Yield the installed distributions and their requirements, without extras."""
    todo, seen = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # it is required on another platform or Python
        if name not in seen:
            seen.add(name)
            yield found
            todo += [re.split(r"[^\w.-]", r)[0] for r in found.requires or [] if "extra ==" not in r]


def link(folder: Path, *names: str) -> Path:
    """Make a folder with links to these distributions and their requirements, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for distribution in closure(*names):
        for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def environment(folder: Path, *names: str) -> Path:
    """Return the interpreter of a new virtual environment with only these distributions."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    link(folder / "lib" / version / "site-packages", *names)
    if "ninja" in names:
        # This is the ninja that setup.py finds here; another one doesn't read its log and compiles everything again.
        found = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
        (folder / "bin" / "ninja").symlink_to(str(found))
    return folder / "bin" / "python"


def pip_install(python: Path, *what: str | Path) -> None:
    # pip has no index, so a requirement that isn't installed makes the installation fail.
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-build-isolation")
    succeed(*pip, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the source distribution."""
    tmp = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tmp / "copy", ignore=NOT_SOURCE)
    build = "import setuptools.build_meta as b; b.build_sdist('dist')"
    succeed(sys.executable, "-c", build, cwd=tmp / "copy")
    (archive,) = (tmp / "copy" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp)
    return tmp / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, full: bool) -> Path:
    """Build the wheel from the source distribution.

    What `make build` compiled from the same sources with the same flags is kept: ninja decides.
    """
    compiled = ROOT / "build" / "native"
    if compiled.exists() and not full:
        shutil.copytree(compiled, sdist / "build" / "native")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", sdist.parent, sdist)
    succeed(*pip, cwd=sdist.parent)
    (found,) = sdist.parent.glob("*.whl")
    return found


def test_sdist_holds_the_sources(sdist: Path) -> None:
    for folder in ("csrc", "custom_ops", "triton_kernels", "benchmarks", "examples", "tests"):
        copy = sdist.parent / "copy" / folder
        expected = {p.relative_to(copy) for p in copy.rglob("*") if p.is_file()}
        assert expected <= {p.relative_to(sdist / folder) for p in (sdist / folder).rglob("*")}, folder
    for file in ("setup.py", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"):
        assert (sdist / file).is_file(), file


def test_wheel_is_for_every_python(wheel: Path) -> None:
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"custom_ops/_C.abi3.so", "custom_ops/py.typed"} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"custom_ops"}
    assert not {n.split("/")[1] for n in names} & {"benchmarks", "examples", "tests", "docs"}


def test_wheel_passes_abi3audit(wheel: Path) -> None:
    report = succeed(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel, cwd=wheel.parent)
    assert "1 extensions scanned; 0 ABI version mismatches and 0 ABI violations found" in " ".join(report.split())


def test_library_loads_wherever_torch_does(wheel: Path) -> None:
    """The library needs no newer glibc or libstdc++ than manylinux_2_28, and exports only what Python calls."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    with zipfile.ZipFile(wheel) as archive, archive.open("custom_ops/_C.abi3.so") as file:
        elf = ELFFile(file)
        needs = [aux.name for _, each in elf.get_section_by_name(".gnu.version_r").iter_versions() for aux in each]
        exported = {s.name for s in elf.get_section_by_name(".dynsym").iter_symbols() if s["st_shndx"] != "SHN_UNDEF"}
    assert needs
    for name in needs:
        library, _, version = name.partition("_")
        assert tuple(map(int, version.split("."))) <= newest[library], name
    assert exported and all(name.startswith("custom_ops_") for name in exported), exported


def test_version_is_that_of_the_wheel(wheel: Path) -> None:
    done = succeed(sys.executable, "-c", "import custom_ops; print(custom_ops.__version__)", cwd=ROOT)
    assert wheel.name.split("-")[1] == done.split()[-1]


def test_library_imports_only_the_stable_abi(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open("custom_ops/_C.abi3.so") as file:
        elf = ELFFile(file)
        needed = {t.needed for t in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        imports = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s.name}
    assert any(name.startswith("aoti_torch_") for name in imports)
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"} | {
        n for n in needed if n.startswith("ld-linux")
    }
    # In a mangled name "3c10" is the namespace c10, unless it ends a longer number.
    assert not [name for name in imports if re.search(r"^_?Py|^_Z.*?(?<!\d)(2at|3c10|5torch)[A-Z\d]", name)]


def test_wheel_works_with_only_torch(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "torch")
    pip_install(python, wheel)
    lines = succeed(python, "-W", "ignore", "-c", USE, cwd=tmp_path).splitlines()
    assert all(Path(line).is_relative_to(tmp_path / "venv") for line in lines), lines


def test_editable_install_works_from_anywhere(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "torch", "setuptools", "ninja")
    pip_install(python, "-e", sdist)  # compiled already for `wheel`
    for cwd in (tmp_path, sdist):
        lines = succeed(python, "-W", "ignore", "-c", USE, cwd=cwd).splitlines()
        assert [Path(line) for line in lines] == [sdist / f / "__init__.py" for f in ("triton_kernels", "custom_ops")]


# ---------------------------------------------------------------- what a broken set-up is told


def old_torch(folder: Path) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text('__version__ = "2.9.1"\n')
    (folder / "torch-2.9.1.dist-info").mkdir()
    (folder / "torch-2.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    return folder


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("torch", ["missing", "old"])
def test_import_without_a_fitting_torch(torch: str, tmp_path: Path) -> None:
    path = [ROOT] + ([old_torch(tmp_path / "old")] if torch == "old" else [])
    done = call(
        sys.executable, "-S", "-c", "import custom_ops", cwd=tmp_path, PYTHONPATH=os.pathsep.join(map(str, path))
    )
    found = "torch isn't installed" if torch == "missing" else "2.9.1 is installed"
    assert only_error(done) == (
        f'ImportError: custom_ops: torch >= 2.10 is needed, and {found}: `pip install "torch>=2.10"`'
    )


def test_import_without_the_library(sdist: Path, tmp_path: Path) -> None:
    shutil.copytree(sdist / "custom_ops", tmp_path / "custom_ops", ignore=NOT_SOURCE)
    error = only_error(call(sys.executable, "-c", "import custom_ops", cwd=tmp_path))
    assert error.startswith("ImportError: custom_ops: the compiled kernels are missing")
    assert "pip install --no-build-isolation -e ." in error


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])  # an installation runs dist_info first
@pytest.mark.parametrize("torch", ["missing", "old"])
def test_build_without_a_fitting_torch(torch: str, command: str, sdist: Path, tmp_path: Path) -> None:
    path = [link(tmp_path / "tools", "setuptools")] + ([old_torch(tmp_path / "old")] if torch == "old" else [])
    env = {"PYTHONPATH": os.pathsep.join(map(str, path))}
    output = ["--output-dir", str(tmp_path)] if command == "dist_info" else ["--build-lib", str(tmp_path)]
    done = call(sys.executable, "-S", "setup.py", "-q", command, *output, cwd=sdist, **env)
    found = (
        "torch is needed to build, and this environment has none"
        if torch == "missing"
        else "torch >= 2.10 is needed to build, and this environment has 2.9.1"
    )
    assert only_error(done) == (
        f'custom_ops: {found}: install it first with `pip install "torch>=2.10" setuptools ninja`, '
        "then `pip install --no-build-isolation .`"
    )
    assert "Traceback" not in done.stdout


def test_build_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    done = call(sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, cwd=sdist, CXX="no-such-compiler -O")
    assert re.match(
        r"custom_ops: a C\+\+17 compiler is needed to build, and 'no-such-compiler -O' .*CXX$", only_error(done)
    )
    assert "Traceback" not in done.stdout


def test_build_without_ninja(sdist: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "torch", "setuptools")
    compiler = shutil.which("c++") or "c++"
    (tmp_path / "bin").mkdir()
    done = call(
        *(python, "setup.py", "-q", "build_ext", "-b", tmp_path), cwd=sdist, CXX=compiler, PATH=str(tmp_path / "bin")
    )
    assert only_error(done) == "custom_ops: ninja is needed to build, and it isn't on the PATH: `pip install ninja`"
    assert "Traceback" not in done.stdout


def test_build_of_code_that_does_not_compile(sdist: Path, tmp_path: Path) -> None:
    shutil.copytree(sdist, tmp_path / "broken", ignore=NOT_SOURCE)
    for source in (tmp_path / "broken" / "csrc").glob("*.cpp"):
        source.unlink()
    (tmp_path / "broken" / "csrc" / "broken.cpp").write_text("int broken(int unused) { return 0; }\n")
    build = (sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path)
    done = call(*build, cwd=tmp_path / "broken", CUSTOM_OPS_WERROR="true")
    assert "error: unused parameter" in done.stdout
    assert only_error(done) == "custom_ops: the C++ kernels did not compile; the compiler's message is above"
    assert "Traceback" not in done.stdout
    succeed(*build, cwd=tmp_path / "broken", CUSTOM_OPS_WERROR="0")


# ---------------------------------------------------------------- CONTRIBUTING.md's example


@pytest.mark.full
def test_the_example_of_contributing_is_an_op(wheel: Path, sdist: Path) -> None:
    """The example is added to the sources of `wheel`, built and verified. This test is last, as it leaves them
    changed.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page, re.DOTALL)
    assert [Path(name).suffix for name, _ in files] == [".cpp", ".py", ".py", ".py"]
    assert sum(bool(line.strip()) for _, source in files for line in source.splitlines()) < 60
    for name, source in files:
        assert not (ROOT / name).exists(), "the example shows an op that the package has"
        (sdist / name).write_text(source)
    with (sdist / "custom_ops" / "activation" / "__init__.py").open("a") as family:
        family.write('\nfrom custom_ops.activation.sine import sine\n\n__all__ += ["sine"]\n')
    succeed(sys.executable, "setup.py", "-q", "build", "--build-lib", "installed", cwd=sdist)
    verify = (
        "-m",
        "custom_ops",
        "verify",
        "--quick",
        "--json",
        "--op",
        "sine",
        "--backend",
        "cpp",
        "--backend",
        "triton",
    )
    done = call(sys.executable, *verify, cwd=sdist / "installed", PYTHONPATH=str(sdist / "installed"))
    report, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index('{\n  "ok"') :])
    assert not [cell for cell in report["cells"] if cell["status"] == "fail"]
    assert {cell["backend"] for cell in report["cells"] if cell["status"] == "pass"} == {"cpp", "triton"}
