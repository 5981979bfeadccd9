"""The gated activation of Llama-like feed-forward layers (SwiGLU, Shazeer 2020)."""
