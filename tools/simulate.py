"""Replays a trace against plans: `python tools/simulate.py TRACE --plan plan.json`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("simulate")
