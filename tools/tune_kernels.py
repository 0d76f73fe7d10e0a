"""Finds the fastest settings of the kernels on this GPU: see ``lab/tune_kernels.py``."""

from lab.tune_kernels import tune
from mixtralkit.cli import run_tool

if __name__ == "__main__":
    run_tool(tune)
