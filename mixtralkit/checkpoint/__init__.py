"""Checkpoints of every known format: bytes on disk to a rank's parameters, and back."""

from mixtralkit.checkpoint.loader import load_into
from mixtralkit.checkpoint.reader import CheckpointReader, open_checkpoint
from mixtralkit.checkpoint.writer import FORMATS, RankFiles, save_checkpoint

__all__ = ["FORMATS", "CheckpointReader", "RankFiles", "load_into", "open_checkpoint", "save_checkpoint"]
