"""What the pass gives."""

from dataclasses import dataclass, field

from torch.fx import GraphModule

from .outputs import Deferral
from .site import Site


@dataclass
class Rewritten:
    """The result of the pass. `graph_module` is the original one where nothing was fused.

    uncompiled: the program differentiates the graph twice, which no compiled graph can be: it has to run as it is.
    unnamed: how many of the sites are losses that no rule has a name for.
    """

    graph_module: GraphModule
    sites: list[Site]
    deferrals: list[Deferral] = field(default_factory=list)
    user_outputs: int = 0
    uncompiled: bool = False
    unnamed: int = 0

    @property
    def fused(self) -> int:
        return sum(s.fused for s in self.sites)
