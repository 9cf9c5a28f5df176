"""The machine and the versions that results hold for."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("kvarn", "torch", "transformers", "numpy")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, CPU threads that torch uses, memory of the machine in bytes, and the device's name."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that results depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, as well as the system knows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
