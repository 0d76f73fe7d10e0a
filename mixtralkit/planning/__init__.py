"""From routing traces to expert plans; NumPy and SciPy only, no model and no ``torch.distributed``."""
