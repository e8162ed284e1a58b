"""A detector as one module or one file: raw rows to logits, scores, decisions and p-values."""
