"""From routing traces to expert plans; numpy only, no model and no ``torch.distributed``."""
