"""``python -m custom_ops verify | bench | demo``: each command is a module's ``main(argv)``."""

from __future__ import annotations

import importlib
import os
import sys

from custom_ops import _native

COMMANDS = {
    "verify": ("custom_ops.verify", "check every op, on every backend, against the capability matrix"),
    "bench": ("custom_ops.benchmarks.run", "time every op beside its peers"),
    "demo": (
        "custom_ops.examples.demo",
        "what is gained beside what one would write today, and models on real data",
    ),
}


def main(argv: list[str]) -> int:
    """What happens to any command from outside is one line, and the exit status that shells give to it."""
    command = argv[0] if argv else ""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # by `| head`
        _drop_output()
        return 141
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib", "numpy", "sklearn", "triton"):
            raise
        extra = "gpu" if error.name == "triton" else "tools"
        print(f"`{command}` needs {error.name}: pip install 'custom_ops[{extra}]'", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that can't be written
        print(f"{command}: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """What can't be written: the interpreter would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage() -> str:
    """The commands, and which of their instruction sets the C++ kernels use here."""
    lines = [f"  {name:8}{summary}" for name, (_, summary) in COMMANDS.items()]
    isas = f"C++ kernels: {_native.isa()}, by CUSTOM_OPS_ISA={'|'.join(_native.isas())}"
    return "\n".join(["usage: python -m custom_ops COMMAND [--help]", *lines, isas])


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"unknown command {argv[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
