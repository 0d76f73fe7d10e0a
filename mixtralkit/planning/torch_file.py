"""What a torch file of other systems holds: plain values and tensors, no larger than the file says."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


def parse_torch(raw: bytes) -> Any:
    """What the file holds; ValueError, without its path, for what is none, or stands for more than the file has."""
    import torch

    try:
        _check_archive(raw)
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, from zip to pickle
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise ValueError(f"is no torch file of plain tensors ({reason})") from None
    if _size(content, {}) > 4 * len(raw):
        raise ValueError("stands for more than the file has: values in it repeat, or a tensor's strides do")
    return content


def _check_archive(raw: bytes) -> None:
    """ValueError for an archive that unpacks to more than the file, or a mapping whose keys are more than words."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in archive.infolist()) > len(raw):
            raise ValueError("it claims more bytes than the file has")
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                _KeysOnly(io.BytesIO(archive.read(name))).load()


class _KeysOnly(pickle._Unpickler):
    """Goes through a pickle, makes nothing, and looks at keys: to hash a tuple of tuples may take for ever."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, *_: str) -> Callable[..., Any]:
        return lambda *_: []

    def persistent_load(self, _: object) -> None:
        return None

    def load_setitem(self) -> None:
        key, _ = self.stack[-2:]
        del self.stack[-2:]
        self._check([key])

    def load_setitems(self) -> None:
        self._check(self.pop_mark()[::2])

    def load_dict(self) -> None:
        self._check(self.pop_mark()[::2])
        self.append({})

    def load_build(self) -> None:
        self.stack.pop()

    def _refuse(self) -> None:
        raise ValueError("it holds sets")

    @staticmethod
    def _check(keys: list[Any]) -> None:
        if not all(isinstance(key, str | int) for key in keys):
            raise ValueError("it has a mapping whose keys are neither texts nor whole numbers")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.FROZENSET[0]] = _refuse


def _size(content: Any, known: dict[int, float]) -> float:
    """Bytes of tensors, and how many other values there are, each as often as it stands there; infinite for a circle.

    Strides of 0 let one number stand for any count of them, and so does a list of lists that are one list.
    """
    import torch

    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if not isinstance(content, Mapping | list | tuple):
        return 1
    if id(content) not in known:
        known[id(content)] = float("inf")
        parts = content.values() if isinstance(content, Mapping) else content
        known[id(content)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(content)]
