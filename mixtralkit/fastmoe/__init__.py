"""FastMoE's layer contract and gates, and the real library as a backend."""
