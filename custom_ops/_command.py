"""The end of a command: an external failure prints one line and gives the exit status that shells expect."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

TOOLS = ("rich", "matplotlib", "numpy", "sklearn")  # modules of the extra `tools`


def run(name: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run ``main(argv)`` of the command ``name`` and return its exit status."""
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`
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
    except OSError as error:  # a full disk, or a folder that can't be written
        print(f"{name}: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Drop unwritten output, as the interpreter would try to write it again at exit and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
