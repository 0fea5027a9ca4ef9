"""Speed, memory and what they buy: measured in turns, on one machine, and written with what they were measured on."""

from caddf.benchmarks.acceptance import AcceptanceSettings, measure_acceptance
from caddf.benchmarks.decode import DecodeSettings, decode
from caddf.benchmarks.infill import InfillSettings, infill
from caddf.benchmarks.pareto import ParetoSettings, pareto
from caddf.benchmarks.scaling import ScalingSettings, scaling
from caddf.benchmarks.steps import StepsSettings, steps
from caddf.benchmarks.train import TrainSettings, train

__all__ = [
    "AcceptanceSettings",
    "DecodeSettings",
    "InfillSettings",
    "ParetoSettings",
    "ScalingSettings",
    "StepsSettings",
    "TrainSettings",
    "decode",
    "infill",
    "measure_acceptance",
    "pareto",
    "scaling",
    "steps",
    "train",
]
