"""The MoE layer: gate, dispatch, experts, combine, for any expert plan."""
