"""Collects the text that the model in ckpts/ is trained on: `python tools/prepare_text.py OUTPUT`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("prepare-text")
