"""Checks and times the Triton kernels and the whole system on a GPU: `make gpu-check`."""
