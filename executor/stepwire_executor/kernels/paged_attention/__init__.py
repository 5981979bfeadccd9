"""Causal attention over KV pages (Kwon et al. 2023, section 4)."""
