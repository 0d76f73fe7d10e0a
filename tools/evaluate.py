"""Scores a model on a prompt set: `python tools/evaluate.py -m ckpts --prompts SET.jsonl --output RUN`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("evaluate")
