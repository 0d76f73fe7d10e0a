"""Policies: pure functions from loads or transitions to an ``ExpertPlan``, one file a policy.

===============  =======================================================================================
``contiguous``   FastMoE's placement (``planning.plan``)
``hot_cold``     the most chosen experts of each layer on every rank (Pangu)
``two_phase``    ranks by estimated popularity, corrected by real counts (Lina)
``affinity``     a token's next expert where the token already is (ExFlow)
``balanced``     replicas and packing for even ranks (EPLB)
``shadow``       FasterMoE's choice, kept
``auto``         the one of all these with the least predicted time
===============  =======================================================================================
"""
