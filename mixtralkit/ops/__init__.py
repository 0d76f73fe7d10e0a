"""Kernels: each public function has a plain-torch twin that says what it computes, and Triton code for Nvidia GPUs.

``name.py`` has the function, the twin and the choice between them; ``name_triton.py`` the Triton code, imported only
where it runs, so that nothing here needs Triton on a CPU.
"""
