"""Measuring a server as its clients see it: a workload, a load, a summary."""
