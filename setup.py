"""The build of custom_ops/_C.abi3.so, the C++ kernels on the LibTorch stable ABI; pyproject.toml has the rest.

The library contains no CPython module: `torch.ops.load_library` loads it. So this file drives ninja directly, with the
same command on every machine. torch.utils.cpp_extension would add the interpreter's own compile flags and link c10.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))
TORCH = (2, 10)  # the oldest torch the library runs on; also in pyproject.toml and custom_ops/_requirements.py

CXXFLAGS = [
    "-std=c++17",
    "-O3",
    # There is no -march, and a * b + c isn't fused: a result must not depend on the machine's instruction set.
    "-ffp-contract=off",
    "-fno-trapping-math",  # changes no value, but lets loops that choose between two quotients be vectorised
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000",
]
LDFLAGS = ["-shared", "-Wl,--as-needed", "-Wl,-z,defs"]
EXPORTS = "csrc/exports.map"
SHARED = "csrc/common.h"  # every file includes it

# `make sanitize` sets CUSTOM_OPS_SANITIZE to one of these and builds in a folder of its own.
SANITIZERS = {
    "address": [
        "-O1",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g1",
    ],
    "thread": ["-fsanitize=thread", "-O1", "-g1", "-include", str(ROOT / "tests" / "sanitize" / "threads.h")],
}

NINJA = """\
cxx = {cxx}
rule precompile
  command = $cxx {cxxflags} -MMD -MF $out.d -x c++-header $in -o $out
  description = precompile $in
  depfile = $out.d
  deps = gcc
rule compile
  command = $cxx {cxxflags} -include precompiled.h -MMD -MF $out.d -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in {ldflags} -o $out
  description = link $out
"""


def fail(message: str) -> NoReturn:
    raise SystemExit(f"\ncustom_ops: {message}\n")


def torch_folder() -> Path:
    """Return the folder of the torch to build against, without importing it."""
    wanted = ".".join(map(str, TORCH))
    remedy = (
        f'install it first with `pip install "torch>={wanted}" setuptools ninja`, '
        "then `pip install --no-build-isolation .`"
    )
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fail(f"torch is needed to build, and this environment has none: {remedy}")
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < TORCH:
        fail(f"torch >= {wanted} is needed to build, and this environment has {version}: {remedy}")
    return Path(spec.submodule_search_locations[0]).resolve()


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        fail(
            f"a C++17 compiler is needed to build, and {' '.join(command)!r} isn't one on the PATH: install one "
            "(`apt install g++`, `dnf install gcc-c++`), or name yours in the environment variable CXX"
        )
    return command


def ninja() -> str:
    # pip puts ninja beside the interpreter. That folder isn't on PATH unless the environment is activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which("ninja", path=path)
    return found or fail("ninja is needed to build, and it isn't on the PATH: `pip install ninja`")


def werror() -> list[str]:
    strict = os.environ.get("CUSTOM_OPS_WERROR") or os.environ.get("CI")
    return ["-Werror"] if strict and strict.lower() not in ("0", "false") else []


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch, cxx, run = torch_folder(), compiler(), ninja()
        sanitizer = os.environ.get("CUSTOM_OPS_SANITIZE", "")
        sanitizing = SANITIZERS[sanitizer] if sanitizer else []
        # setuptools' own folder differs on each editable install, so it isn't used.
        folder = ROOT / "build" / (sanitizer or "native")
        folder.mkdir(parents=True, exist_ok=True)

        # Relative paths, so that what is compiled here can be moved with the sources: tests/test_packaging.py does.
        exports = os.path.relpath(ROOT / EXPORTS, folder)

        # A packager's flags come first, so that ours win.
        cxxflags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *CXXFLAGS, *sanitizing, *werror()]
        cxxflags += ["-isystem", f"{torch}/include"]
        ldflags = [
            *shlex.split(os.environ.get("LDFLAGS", "")),
            *LDFLAGS,
            f"-Wl,--version-script={exports}",
            *(sanitizing or ["-s"]),
            f"-L{torch}/lib",
            "-ltorch_cpu",
        ]
        # The largest source comes first, so no core is left alone with it at the end.
        ordered = sorted(ext.sources, key=lambda source: -(ROOT / source).stat().st_size)
        objects = [f"{Path(source).stem}.o" for source in ordered]
        rules = NINJA.format(cxx=_quoted(cxx), cxxflags=_quoted(cxxflags), ldflags=_quoted(ldflags))
        sources = [os.path.relpath(ROOT / source, folder) for source in ordered]
        # torch's headers take as long as a small kernel, and are the same in each file.
        precompiled, text = folder / "precompiled.h", f'#include "{os.path.relpath(ROOT / SHARED, folder)}"\n'
        if not precompiled.exists() or precompiled.read_text() != text:  # writing it has all compiled again
            precompiled.write_text(text)
        build = rules + "build precompiled.h.gch: precompile precompiled.h\n"
        for target, source in zip(objects, sources):
            build += f"build {target}: compile {_path(source)} | precompiled.h.gch\n"
        build += f"build _C.abi3.so: link {' '.join(objects)} | {_path(exports)}\n"
        (folder / "build.ninja").write_text(build)

        if subprocess.run([run, "-C", str(folder)]).returncode:
            fail("the C++ kernels did not compile; the compiler's message is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "_C.abi3.so"), str(target))


class CheckedDistInfo(dist_info):
    """A metadata step that checks torch's version, so a build fails before pip fetches a torch of its own choice."""

    def run(self) -> None:
        torch_folder()
        super().run()


def _quoted(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


setup(
    packages=[*find_packages(include=["custom_ops", "custom_ops.*"]), "custom_ops.triton_kernels"],
    package_dir={"custom_ops.triton_kernels": "triton_kernels"},  # other packages use the bare import name
    ext_modules=[Extension("custom_ops._C", SOURCES, py_limited_api=True)],
    cmdclass={"build_ext": BuildWithNinja, "dist_info": CheckedDistInfo},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
