"""What the numbers were taken on: machine, versions, commit, and probes of the memory bandwidth."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.registry import Run
from benchmarks.timing import Contestant

__all__ = [
    "PROBES",
    "commit",
    "describe",
    "device_slug",
    "memory",
    "probes",
    "results_folder",
    "slug",
    "stamp",
    "versions",
]

ROOT: Final = Path(__file__).resolve().parent.parent

PROBES: Final = {"copy": 8, "update": 12}
"""Bytes per element of the bandwidth probes.

``copy`` is ``y.copy_(x)``: 4 read, 4 written (a CPU may also read what it is going to overwrite,
which is not counted). ``update`` is ``y.add_(x)``: 8 read, 4 written in place, as in a step.
"""


def probes(device: torch.device, elements: int) -> list[Contestant]:
    """Contestants that do nothing but move memory, to be timed in the same rounds."""
    # not zeros, which the operating system may keep in one single page
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    copy = Run(lambda: target.copy_(source))
    update = Run(lambda: target.add_(source))
    return [Contestant("copy", lambda: copy), Contestant("update", lambda: update)]


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, in words and numbers."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(memory()[0] / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_l2_mib"] = round(properties.L2_cache_size / 2**20, 1)
        found["driver"] = _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    return found


def device_slug(device: torch.device) -> str:
    """A name for the folder of results: ``cpu-amd-epyc-2-cores``, ``nvidia-h100-80gb-hbm3``."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return slug(f"cpu {_cpu_name()} {os.cpu_count()} cores")


def results_folder(device: torch.device) -> Path:
    """Where results of a machine are kept unless they are to go elsewhere."""
    return ROOT / "benchmarks" / "results" / device_slug(device)


def stamp(suite: str, device: torch.device) -> dict[str, Any]:
    """What stands with the rows of a suite: when, at which commit, where, and how busy it was."""
    found, dirty = commit()
    return {
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": found,
        "dirty": dirty,
        "machine": device_slug(device),
        "machine_details": describe(device),
        "versions": versions(()),
        "load": os.getloadavg()[0],
    }


def slug(name: str) -> str:
    """``name`` in lower case, words joined by hyphens, without trade marks and clock rates."""
    plain = re.sub(r"\((r|tm)\)|@.*?hz|\b(cpu|processor)\b(?!-)", " ", name.lower())
    prefix = "cpu-" if name.lower().startswith("cpu ") else ""
    return prefix + re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def memory() -> tuple[int, int]:
    """Bytes of memory that the machine has, and that are free or can be made free."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    available = re.findall(r"MemAvailable:\s*(\d+) kB", info.read_text() if info.exists() else "")
    return total, int(available[0]) * 1024 if available else total // 2


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python, the compiler and the packages; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "compiler": _first_line([shutil.which("c++") or "cc", "--version"]),
        "cuda": torch.version.cuda,
    }
    for package in ("lhopt-fused", "torch", "triton", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> tuple[str, bool]:
    """The checked-out commit ("unknown" outside a repository), and whether files differ from it.

    Results do not count: they are written after the commit that they are of.
    """
    head = _first_line(["git", "rev-parse", "--short=12", "HEAD"])
    changes = _first_line(
        ["git", "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    )
    return head or "unknown", bool(changes)


def _first_line(command: list[str]) -> str | None:
    """First line that a command prints; None if it fails, prints nothing or is not there."""
    try:
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    lines = output.stdout.strip().splitlines()
    return lines[0] if lines else None


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return str(names[0]) if names else platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Sizes of the first core's caches, as Linux lists them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (
            (index / name).read_text().strip() if (index / name).exists() else "?"
            for name in ("type", "level", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found
