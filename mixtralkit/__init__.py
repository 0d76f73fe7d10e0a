"""Mixtral inference over any number of ranks, with every scheme for hot and cold experts in one MoE layer.

Tensor names carry their shape as a suffix, one letter a dimension (``x_TD``, ``w13_SGD``):

=====  ==================================================================================
``T``  tokens of a step on this rank, all sequences flattened one after the other
``B``  sequences
``D``  model width (``dim``)
``H``  attention heads of this rank; ``J`` key-value heads of this rank; ``C`` head width
``F``  expert hidden width on this rank; ``G`` = 2·F, the gate and up projections stacked
``E``  logical experts
``S``  expert slots of a rank: the experts whose weights it holds (a replica is a slot)
``K``  experts per token
``N``  routed rows, T·K
``R``  rows a rank received from others
``W``  ranks
``L``  layers
``P``  positions of a page of the KV cache; ``M`` pages of a sequence
``V``  vocabulary
=====  ==================================================================================
"""

from typing import TYPE_CHECKING, Any

from mixtralkit.version import __version__

if TYPE_CHECKING:
    from mixtralkit.mixtral import Mixtral

__all__ = ["Mixtral", "__version__"]


def __getattr__(name: str) -> Any:
    # Planning and the checkpoint tools need no engine: it is imported when somebody asks for it.
    if name == "Mixtral":
        from mixtralkit.mixtral import Mixtral

        return Mixtral
    raise AttributeError(f"module 'mixtralkit' has no attribute {name!r}")
