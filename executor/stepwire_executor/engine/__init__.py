"""Runs the work of a step: one engine that feeds the model from host memory, one from a device."""

from stepwire_executor.engine.interface import (
    Decoder,
    LaunchedStep,
    SampledRows,
    StepEngine,
    StepTimes,
)

__all__ = ["Decoder", "LaunchedStep", "SampledRows", "StepEngine", "StepTimes"]
