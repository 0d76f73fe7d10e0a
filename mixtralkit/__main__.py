"""``python -m mixtralkit``, and under torchrun ``torchrun … -m mixtralkit``."""

from mixtralkit.cli import main

if __name__ == "__main__":
    main()
