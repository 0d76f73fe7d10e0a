"""Training of small Mixtrals: text to tokens, deterministic batches, losses, the loop over ranks."""
