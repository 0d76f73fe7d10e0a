"""Benchmarks, run as modules from the repository's root; README.md says which one answers what."""
