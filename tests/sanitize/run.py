"""``make sanitize``: run the C++ kernels under sanitizers.

``python tests/sanitize/run.py address|thread [OP ...]`` builds the package with that sanitizer into ``build/NAME`` and
runs the whole battery there, then random calls, wrong calls and corrupted indices (tests/test_errors.py, called
``errors`` here). The first finding ends the run with its report.

"address" is AddressSanitizer with UndefinedBehaviorSanitizer, on torch's own threads. "thread" is ThreadSanitizer;
there our parallel loops run on threads of their own (threads.h), because torch's OpenMP runtime isn't instrumented. It
finds races in our loops and doesn't look for races in torch's code.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g1"],
    "thread": ["-fsanitize=thread", "-g1"],
}  # keep in step with setup.py
FAULTS = {"address": ["overflow", "undefined"], "thread": ["race"]}  # planted by planted.cpp
CALLS = 40  # random calls of each op
ERRORS = "errors"
RUNTIMES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}
OPTIONS = {
    # Python and torch free much of their memory only at exit. Frames of Python aren't instrumented.
    "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
}


def main(sanitizer: str) -> int:
    folder = ROOT / "build" / sanitizer
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", folder / "lib"]
    subprocess.run([str(c) for c in build], cwd=ROOT, env=os.environ | {"CUSTOM_OPS_SANITIZE": sanitizer}, check=True)
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    found = [
        subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    env = os.environ | OPTIONS | {"LD_PRELOAD": ":".join(found), "PYTHONPATH": str(folder / "lib")}
    env |= {"OMP_NUM_THREADS": "1"} if sanitizer == "thread" else {}
    # Thread sanitizers of older compilers fail under address space randomisation.
    python = ["setarch", "-R", sys.executable, "-W", "ignore"]

    planted = Path(__file__).with_name("planted.cpp")
    flags = [*SANITIZERS[sanitizer], "-shared", "-fPIC", "-pthread"]
    subprocess.run([*cxx, *flags, planted, "-o", folder / "planted.so"], check=True)
    for fault in FAULTS[sanitizer]:
        call = f"import ctypes; ctypes.CDLL({str(folder / 'planted.so')!r}).{fault}(1000)"
        done = subprocess.run([*python, "-c", call], env=env, stderr=subprocess.PIPE, text=True, check=False)
        if not done.returncode:
            print(f"{sanitizer}: a planted fault, {fault}, isn't reported {done.stderr}", file=sys.stderr)
            return 2
    return subprocess.run([*python, __file__, "--inside", *sys.argv[2:]], cwd=folder, env=env, check=False).returncode


def inside(ops: list[str]) -> int:
    import pytest
    from rich.console import Console
    from rich.progress import Progress

    import custom_ops
    from custom_ops.registry import REGISTRY
    from custom_ops.verify import check, random_sample, verify

    assert Path(custom_ops.__file__).is_relative_to(ROOT / "build"), custom_ops.__file__
    ops = ops or [*REGISTRY, ERRORS]
    failures = []
    with Progress(console=Console(stderr=True)) as bar:
        for name in bar.track([op for op in ops if op != ERRORS], description="ops"):
            info = REGISTRY[name]
            report = verify(info, quick=True)
            failures += [f"{cell.op}, {cell.capability}: {cell.detail}" for cell in report.failures]
            for number in range(CALLS):
                try:
                    check(info, random_sample(info, random.Random(number).choice))
                except AssertionError as error:
                    failures.append(str(error))
    errors = ["-q", "-n0", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_errors.py")]
    if ERRORS in ops and pytest.main(errors):
        failures.append("tests/test_errors.py")
    print("\n".join(failures))
    print(f"{', '.join(ops)}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2:]) if sys.argv[1] == "--inside" else main(sys.argv[1]))
