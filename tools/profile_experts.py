"""Records which experts a prompt set uses: `python tools/profile_experts.py PROMPTS TRACE -m ckpts`."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main("profile", "show", "popularity")
