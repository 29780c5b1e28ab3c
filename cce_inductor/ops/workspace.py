"""How many bytes of scratch a call may take, by the knob `workspace_mb` and the device."""

import torch

from .call import MIB

ON_CPUS = 64 * MIB
# On GPUs a 128th of the memory, and no more than this.
MOST_ON_GPUS = 512 * MIB
SHARE_ON_GPUS = 128
# Cards of one kind differ in what they report by less than this: all ranks compile with the same number.
GRAIN = 16 * MIB
# More than any logits: whatever runs takes no more than the logits that are saved.
AUTO = 1 << 40


def workspace(setting: int | str | None, device: torch.device) -> int:
    """Bytes of scratch on a device, for a value of `workspace_mb`: MiB, "auto", or None for the device's own."""
    if setting == "auto":
        return AUTO
    if setting is not None:
        return int(setting) << 20
    if device.type != "cuda":
        return ON_CPUS
    share = torch.cuda.get_device_properties(device).total_memory // SHARE_ON_GPUS
    return max(GRAIN, min(MOST_ON_GPUS, share // GRAIN * GRAIN))


def said(setting: int | str | None, device: torch.device, logits: int | None) -> str:
    """`workspace_mb` as a call has it, for people. logits: bytes of those that are saved; None: unknown."""
    if setting == "auto":
        return "auto, as much as the logits" + ("" if logits is None else f": at most {logits / MIB:,.1f} MiB")
    size = workspace(setting, device) // MIB
    if setting is not None:
        return str(size)
    return f"{size}, the default on {'GPUs' if device.type == 'cuda' else 'CPUs'}"
