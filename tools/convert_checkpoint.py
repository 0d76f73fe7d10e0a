"""Converts a checkpoint: `python tools/convert_checkpoint.py SOURCE TARGET --format hf`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("convert")
