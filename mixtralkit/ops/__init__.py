"""Ops: each public function has a reference in plain torch that says what it computes, and Triton code for Nvidia GPUs.

A folder an op: its function and the choice in ``__init__.py``, ``reference.py``, ``types.py`` where both need them, and
Triton code, imported only where it runs, so that nothing here needs Triton on a CPU. One guard chooses for all:
``runtime.runs_triton``. Modules of a folder import each other, never their ``__init__.py``, so that no circle is tied.
"""
