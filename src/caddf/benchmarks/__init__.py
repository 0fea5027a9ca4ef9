"""Speed, memory and what they buy: measured in turns, on one machine, and written with what they were measured on."""

from caddf.benchmarks.acceptance import ACCEPTANCE, AcceptanceSettings, measure_acceptance
from caddf.benchmarks.decode import DECODE, DecodeSettings, decode
from caddf.benchmarks.infill import INFILL, InfillSettings, infill
from caddf.benchmarks.pareto import PARETO, ParetoSettings, pareto
from caddf.benchmarks.results import Benchmark
from caddf.benchmarks.scaling import SCALING, ScalingSettings, scaling
from caddf.benchmarks.steps import STEPS, StepsSettings, steps
from caddf.benchmarks.train import TRAIN, TrainSettings, train

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each for each in (DECODE, PARETO, SCALING, STEPS, ACCEPTANCE, INFILL, TRAIN)
}

__all__ = [
    "BENCHMARKS",
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
