"""Continues prompts, or chats: `python tools/example.py -m ckpts`, or `torchrun … tools/example.py -m ckpts`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("generate", "chat")
