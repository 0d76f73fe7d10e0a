"""Triton's interpreter without what it does again and again: a third of the time of the kernels' tests."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import SimpleNamespace


@functools.cache
def hasten() -> None:
    """Triton's language is made the interpreter's once a launch, in one list of changes found at the first.

    Triton searches the language's modules in every launch and again in every call of a device function within it; of
    types it makes a table whenever it is asked for one. Nothing happens where kernels are compiled.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, changes = interpreter._patch_lang, []
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what kernels or device functions may see

    def patch_once(fn: object) -> interpreter._LangPatchScope:
        if not changes:
            scope = patch(everything)
            changes.extend((place, name, getattr(place, name)) for place, name, _ in scope._changes)
            return scope
        scope = interpreter._LangPatchScope()
        for change in changes:
            scope.set_attr(*change)
        return scope

    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    look, known = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: (look if kind.scalar.is_ptr() else known)(kind.scalar)
