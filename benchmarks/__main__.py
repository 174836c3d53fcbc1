"""The entry point of ``python -m benchmarks`` in a checkout."""

import sys

from custom_ops._command import run


def _main(argv: list[str]) -> int:
    from benchmarks.run import main

    return main(argv)


def main(argv: list[str]) -> int:
    return run("benchmarks", _main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
