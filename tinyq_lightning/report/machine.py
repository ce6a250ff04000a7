"""On what a run was measured: processor, threads and versions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

__all__ = [
    "machine",
]

_PACKAGES = ("lightning", "pytorch-lightning", "torchmetrics")


def machine() -> dict[str, str | int]:
    """The processor by name, the GPU if there is one, torch's threads and instructions, the system, and versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def _processor() -> str:
    """The name of the processor, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
