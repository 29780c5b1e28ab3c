"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ISA = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def total_ram() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's if that is less."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(ram, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return ram


def memory_of(device: str) -> int:
    """Bytes of memory that the processes of a case share on a device."""
    if device == "cpu":
        return total_ram()
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {"cpu": fields.get("model name", platform.machine()), "isa": [flag for flag in ISA if flag in flags]}


def _commit() -> str | None:
    """The commit measured, marked if the files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _gpu() -> dict[str, Any]:
    import torch
    import triton

    properties = torch.cuda.get_device_properties("cuda")
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def describe(device: str = "cpu") -> dict[str, Any]:
    """What results are stored with, for JSON: processor, memory in bytes, versions, date, commit."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **(_gpu() if device == "cuda" else {}),
        **_cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "ram": total_ram(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """What `describe` gave, for people."""
    isa = ", ".join(machine["isa"]) or "no extension we know"
    gpu = ""
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']}, {machine['multiprocessors']} multiprocessors, "
            f"{machine['gpu_memory'] / (1 << 30):.0f} GiB, CUDA {machine['cuda']}, Triton {machine['triton']}; "
        )
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"{gpu}{machine['cpu']} ({isa}), {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['ram'] / (1 << 30):.0f} GiB; torch {machine['torch']}; {machine['date']}{commit}"
    )
