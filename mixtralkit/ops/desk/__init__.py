"""What a running step and the host hand each other: ``moe/tiers/desk.py`` says how."""
