"""The programs that are compared: each in a process of its own, its output flushed to the disk."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# In KiB, of this program alone: getrusage begins with the peak of the process that started it.
PEAK = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("peak", peak)
"""
LORAFX = """
import runpy
try:
    runpy.run_module("lorafx", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end
""" + PEAK
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
""" + PEAK
IMPORT = "import lorafx; lorafx.merge" + PEAK  # a name is imported when it is first used


def run(code: str, *arguments: str | Path) -> dict[str, Any]:
    """Seconds and peak resident bytes of a Python program that prints its own peak in the end."""
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a program ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak": 1024 * int(done.stdout.split()[-1])}


def flush(path: Path) -> None:
    """Let what was written to a file reach the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def copy(folder: Path, out: Path) -> dict[str, Any]:
    """Seconds for copying the checkpoint's files one by one."""
    began = time.perf_counter()
    out.mkdir()
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        flush(out / path.name)
    return {"seconds": time.perf_counter() - began, "peak": None}


def lorafx(folder: Path, out: Path) -> dict[str, Any]:
    """`lorafx merge`, which flushes what it writes."""
    return run(LORAFX, "merge", folder / "base", folder / "peft", "-o", out)


def peft(folder: Path, out: Path) -> dict[str, Any]:
    """PEFT's: load the model and the adapter, merge_and_unload, save_pretrained."""
    began = time.perf_counter()
    found = run(PEFT, folder / "base", folder / "peft", out)
    for path in out.iterdir():
        flush(path)
    return {**found, "seconds": time.perf_counter() - began}


def free_memory() -> int:
    """Bytes that this machine has to give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo does not say what is available")
