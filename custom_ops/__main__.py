"""``python -m custom_ops verify | bench | demo``: each command is a module's ``main(argv)``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "verify": ("custom_ops.verify", "check every op, on every backend, against the capability matrix"),
    "bench": ("custom_ops.benchmarks.run", "time every op beside its peers"),
    "demo": ("custom_ops.examples.demo", "train models through our ops, two of them on real data"),
}


def main(argv: list[str]) -> int:
    usage = "usage: python -m custom_ops COMMAND [--help]\n" + "\n".join(
        f"  {name:8}{summary}" for name, (_, summary) in COMMANDS.items()
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if argv[0] not in COMMANDS:
        print(f"unknown command {argv[0]!r}\n{usage}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[argv[0]][0])
        return int(module.main(argv[1:]))
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib", "numpy", "sklearn", "triton"):
            raise
        print(f"`{argv[0]}` needs {error.name}: pip install 'custom_ops[tools]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
