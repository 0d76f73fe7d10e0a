"""Trains a small Mixtral: `python tools/train_tiny.py OUTPUT --text FILE`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("train")
