"""Policies: pure functions from loads or transitions to an ``ExpertPlan``, one file a policy; names in ``registry``."""
