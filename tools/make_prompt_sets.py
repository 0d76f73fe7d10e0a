"""Makes configs/prompts/heldout.jsonl: `python tools/make_prompt_sets.py TEXT`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("prompt-sets")
