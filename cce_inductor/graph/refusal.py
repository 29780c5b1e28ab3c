"""Why something is left as it was: refusals are values, and end up in the record."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


class Refused(Exception):
    """Raised inside the trace where it cannot go on; becomes a `Refusal`."""

    def __init__(self, reason: str, cure: str):
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Refusal:
    """Why a site was left as it was: the node at fault, what is wrong with it, and what would make it fuse."""

    node: Node
    reason: str
    cure: str
