"""How a command ends: what happens to it from outside is one line, and the exit status that shells give to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

TOOLS = ("rich", "matplotlib", "numpy", "sklearn")  # of the extra `tools`


def run(name: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit status of ``main(argv)``, of the command ``name``."""
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # by `| head`
        _drop_output()
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in (*TOOLS, "triton"):
            raise
        extra = "gpu" if error.name == "triton" else "tools"
        print(f"`{name}` needs {error.name}: pip install 'custom_ops[{extra}]'", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that can't be written
        print(f"{name}: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """The interpreter would try to write what is left once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
