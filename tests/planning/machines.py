"""A machine of round figures for tests of the time model."""

from __future__ import annotations

from mixtralkit.planning.hardware import Hardware, Link, Network


def machine(across: bool = False, **changes) -> Hardware:
    """Memory 1e12 B/s, products at 1e12 FLOP/s a row up to 100 rows, wires 1e10 B/s inside and 1e9 across."""
    near, far = Link(1e-5, 1e10), Link(1e-4, 1e9)
    values = {
        "name": "test", "date": "2026-01-01", "machine": "", "source": "", "data_bytes": 2,
        "memory_bandwidth": 1e12, "matrix_rates": ((1, 1e12), (100, 1e14)), "launch_s": 1e-6, "sync_s": 1e-5,
        "overlaps": True, "inside": Network(4, near, near, near),
        "across": Network(2, far, far, far) if across else None,
    }  # fmt: skip
    return Hardware(**{**values, **changes})
