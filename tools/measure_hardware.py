"""Measures a machine: `torchrun --standalone --nproc_per_node=4 tools/measure_hardware.py NAME`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("measure")
