"""Where a figure was measured: as data for the JSON files, and in words."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PROCESSORS = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: day, versions, processor, cores, threads, load."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "lorafx")}
    on_gpu = device.type == "cuda"
    return {"date": str(datetime.date.today()), "python": platform.python_version(), **versions,
            "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load_before": round(os.getloadavg()[0], 2),
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu"}


def processor() -> str:
    """The processor's name, or its architecture where the system does not name it."""
    lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def in_words(found: Mapping[str, Any], *libraries: str) -> str:
    """Where and when, as a sentence begins: On 2 cores (...), Python 3.11, torch 2.13.0, on ..."""
    count = f"{found['threads']} core" + "s" * (found["threads"] != 1)
    where = found["device"] if found["device"] != "cpu" else f"{count} ({found['processor']})"
    python, torch_version = found["python"].rpartition(".")[0], found["torch"].partition("+")[0]
    others = "".join(f", {name.upper()} {found[name]}" for name in libraries)
    return f"On {where}, Python {python}, torch {torch_version}{others}, on {found['date']}"
