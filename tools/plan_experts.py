"""Plans which ranks hold which experts: `python tools/plan_experts.py TRACE --world_size 4`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("plan")
