"""The versions and the hardware that every result file records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from custom_ops import _native


def machine() -> dict[str, Any]:
    info: dict[str, Any] = {
        "custom_ops": _version("custom_ops"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": _line(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": _native.isa(),
        "ram": _line(Path("/proc/meminfo"), "MemTotal"),
        "load": round(os.getloadavg()[0], 1),
        "huge pages": _selected(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
    }
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        info |= {"device": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda}
        info |= {"triton": _version("triton")}
    return info


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution that provides one of these top-level modules."""
    owners = importlib.metadata.packages_distributions()
    names = {name for module in modules for name in owners.get(module, ())} - {"custom_ops", "torch"}
    return {name: version for name in sorted(names) if (version := _version(name))}


def describe(machine: dict[str, Any], device: str, memory: str) -> str:
    """Return one line that says where and how a run was measured."""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    cpu = f"{machine['cpu']}, {threads}, {machine['isa']}"
    return f"{cpu}, {memory} memory" if device == "cpu" else f"{machine['device']} (host: {cpu})"


def trouble(machine: dict[str, Any]) -> str:
    """Return why the timings of this run are not to be trusted, or "" if nothing speaks against them."""
    if machine["load"] <= 0.5 * machine["cores"]:
        return ""
    return f"the load was {machine['load']} on {machine['cores']} cores when the run began: don't rely on its timings"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(path: Path, key: str) -> str | None:
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return None


def _selected(path: Path) -> str | None:
    """Return the selected choice, in [brackets], of a kernel setting."""
    return path.read_text().partition("[")[2].partition("]")[0] if path.exists() else None
