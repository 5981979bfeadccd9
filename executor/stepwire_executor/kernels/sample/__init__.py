"""Choosing tokens: a pure function of logits, parameters, seed and position."""
