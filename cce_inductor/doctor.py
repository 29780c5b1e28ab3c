"""``python -m cce_inductor doctor``: what this installation supports and which hooks are in force."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from . import compat, config, switch, version


def _torch() -> list[tuple[str, str]]:
    support = "supported" if compat.is_supported() else f"outside {compat.supported_span()}"
    triton = _installed("triton") or "not installed: no GPU kernels, no interpreter tests"
    return [
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} ({support})"),
        ("triton", triton),
        (
            "cce_inductor",
            f"{_installed('cce-inductor') or 'not installed, run from a checkout'}, source {version.source_hash()}",
        ),
        ("templates", str(version.templates_dir())),
    ]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")]
    found += [(f"cpu {name}", "yes" if there else "no") for name, there in compat.cpu_extensions()]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            found.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    else:
        found.append(("cuda", "none"))
    return found


def _hooks() -> list[tuple[str, str]]:
    import torch._dynamo

    named = "cce" in torch._dynamo.list_backends()
    flag = os.environ.get("CCE_INDUCTOR")
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "0"
    return [
        (
            'backend="cce"',
            "registered" if named else "unknown to torch.compile: install the package (pip install -e .)",
        ),
        ("CCE_INDUCTOR", f"{flag!r}" if flag is not None else "not set"),
        (
            "plugins of import torch",
            "loaded" if autoload else "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0): CCE_INDUCTOR has no effect",
        ),
        (
            "plain torch.compile",
            "uses cce_inductor" if switch.enabled() else "does not use cce_inductor (enable() turns it on)",
        ),
    ]


def _caches() -> list[tuple[str, str]]:
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    return [
        ("compile cache", f"{folder} ({'exists' if folder.is_dir() else 'empty'})"),
        ("FX-graph cache", "on" if torch._inductor.config.fx_graph_cache else "off"),
        ("AOTAutograd cache", "on" if torch._functorch.config.enable_autograd_cache else "off"),
    ]


def _settings() -> list[tuple[str, str]]:
    settings = config.current()
    return [(name, f"{getattr(settings, name)!r}: {knob.doc}") for name, knob in config.KNOBS.items()]


def report() -> str:
    """The whole report as text."""
    parts = {"versions": _torch(), "devices": _devices(), "hooks": _hooks(), "caches": _caches(), "config": _settings()}
    lines = []
    for title, rows in parts.items():
        lines.append(title)
        lines += [f"  {name:<26} {text}" for name, text in rows]
    return "\n".join(lines)
