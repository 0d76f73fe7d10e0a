"""Finds the fastest settings of the kernels on this GPU: `python tools/tune_kernels.py --minutes 5`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("tune")
