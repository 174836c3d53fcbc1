"""``python -m custom_ops verify | new``."""

from __future__ import annotations

import importlib
import sys

from custom_ops import _native
from custom_ops._command import run

COMMANDS = {
    "verify": ("custom_ops.verify", "check every op, on every backend, against the capability matrix"),
    "new": ("custom_ops._new", "write a small package with an op of its own, and tests that pass"),
}


def usage() -> str:
    """Return the commands, and the instruction set that the C++ kernels use here."""
    lines = [f"  {name:8}{summary}" for name, (_, summary) in COMMANDS.items()]
    isas = f"C++ kernels: {_native.isa()}, by CUSTOM_OPS_ISA={'|'.join(_native.isas())}"
    return "\n".join(["usage: python -m custom_ops COMMAND [--help]", *lines, isas])


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"unknown command {argv[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))


def main(argv: list[str]) -> int:
    return run(argv[0] if argv else "custom_ops", _main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
