"""``python -m custom_ops verify``."""

from __future__ import annotations

import sys

from custom_ops import _native
from custom_ops._command import run


def usage() -> str:
    """Names the command, and which of their instruction sets the C++ kernels use here."""
    return (
        "usage: python -m custom_ops verify [--help]\n"
        "  verify  check every op, on every backend, against the capability matrix\n"
        f"C++ kernels: {_native.isa()}, by CUSTOM_OPS_ISA={'|'.join(_native.isas())}"
    )


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] != "verify":
        print(f"unknown command {argv[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    from custom_ops.verify import main

    return main(argv[1:])


def main(argv: list[str]) -> int:
    return run(argv[0] if argv else "custom_ops", _main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
