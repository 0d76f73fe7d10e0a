"""Cold experts in host memory: the GPU's places are a cache over (layer, expert). See docs/host-memory.md.

``memory`` has every expert of a rank, ``cache`` says which of them are in places, ``bus`` brings them there,
``arrivals`` has those that come before they are wanted, ``costs`` says what a miss costs, ``tiers`` decides.
"""

from mixtralkit.moe.tiers.costs import Costs
from mixtralkit.moe.tiers.desk import Desk
from mixtralkit.moe.tiers.experts import TieredExperts
from mixtralkit.moe.tiers.room import gpu_setup, tier_setup
from mixtralkit.moe.tiers.setup import TierCounts, TierSetup
from mixtralkit.moe.tiers.tiers import Tiers

__all__ = ["Costs", "Desk", "TierCounts", "TierSetup", "TieredExperts", "Tiers", "gpu_setup", "tier_setup"]
