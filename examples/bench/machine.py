"""What a figure depends on besides the code: the processor, the versions, what becomes of memory that is free."""

import importlib.metadata
import os
import platform

import torch

PACKAGES = (
    "torch",
    "tinyq-lightning",
    "torchao",
    "optimum-quanto",
    "bitsandbytes",
    "transformers",
    "onnxruntime",
    "openvino",
    "nncf",
)
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")

ALLOCATION = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def describe() -> dict[str, str]:
    """Processor, its instructions as torch uses them, how busy it was, the allocator, and the versions of all timed."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch has none
    vnni = ", ".join(name for name in INT8_INSTRUCTIONS if known.get(name)) or "no"
    return {
        "processor": known.get("cpu_name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "VNNI": vnni if known else "unknown",
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "allocator": " ".join(f"{name}={os.environ[name]}" for name in ALLOCATION if name in os.environ) or "default",
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
