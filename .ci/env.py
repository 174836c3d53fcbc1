"""The Makefile's questions to an interpreter; a question is answered by what is printed, and nothing means no."""

import sys

if sys.version_info < (3, 10):
    sys.exit(
        "custom_ops: Python >= 3.10 is needed, and %s is %d.%d: name another, `make PYTHON=python3.12 ...`"
        % (sys.executable, *sys.version_info[:2])
    )

import importlib.metadata
import json
import pathlib
import re
import sysconfig


def active():
    """Return the interpreter if its environment has torch >= 2.10 and accepts installations."""
    marker = pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")  # PEP 668
    managed = sys.prefix == sys.base_prefix and marker.exists()
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    new = tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= (2, 10)
    return sys.executable if new and not managed else ""


def installed():
    """Return whether its custom_ops is an editable install of this folder."""
    try:
        url = importlib.metadata.distribution("custom_ops").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return ""
    return "yes" if json.loads(url).get("url") == pathlib.Path.cwd().as_uri() else ""


print({"supported": str, "active": active, "installed": installed}[sys.argv[1]]())
