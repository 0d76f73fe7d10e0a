"""``configs/``: beside the package in a source tree, the package ``mixtralkit.configs`` in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)


def shipped(folder: str, name: str | Path = "") -> Path:
    """A file of ``configs/FOLDER`` by its name without ending, or the path that ``name`` is anyway.

    ``shipped("hardware", "h200")`` is ``…/configs/hardware/h200.json``; without a name the folder itself.
    """
    if not str(name):
        return _CONFIGS / folder
    path = Path(name)
    if path.suffix or path.parent != Path(".") or path.is_file():
        return path
    return next((_CONFIGS / folder).glob(f"{path}.*"), path)
