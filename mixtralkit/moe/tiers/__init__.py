"""Cold experts in host memory: the GPU's places are a cache over (layer, expert). See docs/host-memory.md.

``host`` has every expert of a rank, ``cache`` says which of them are in places, ``bus`` brings them there, ``costs``
says what a miss costs, and ``tiers`` decides and computes.
"""

from mixtralkit.moe.tiers.costs import Costs
from mixtralkit.moe.tiers.experts import TieredExperts
from mixtralkit.moe.tiers.room import tier_setup
from mixtralkit.moe.tiers.setup import TierCounts, TierSetup
from mixtralkit.moe.tiers.tiers import Tiers

__all__ = ["Costs", "TierCounts", "TierSetup", "TieredExperts", "Tiers", "tier_setup"]
