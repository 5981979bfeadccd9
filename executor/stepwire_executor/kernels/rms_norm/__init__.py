"""Root-mean-square normalisation with an optional residual sum (Zhang & Sennrich 2019)."""
