"""Kernels for CPUs: compiled C++ (``build``), and what runs where no compiler is (``fallback``). See docs/cpu.md."""
