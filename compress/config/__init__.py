"""The typed configuration of a run, one module for each stage; ``run`` puts them together."""

from compress.config.deployment import (
    BatchSizes,
    BenchConfig,
    ExportConfig,
    Fp16Limits,
    Int8Limits,
    ParityLimits,
    Precision,
    PrecisionLimits,
    Runtime,
)
from compress.config.images import DataConfig, ModelConfig
from compress.config.pruning import CRITERION_NUMBERS, SEED2019_PRUNE, Budget, PruneConfig
from compress.config.run import DEFAULT_CONFIG, RunConfig, load_config, register_reader, save_config
from compress.config.training import (
    SEED2019,
    ComputeConfig,
    FinetuneConfig,
    SaveConfig,
    TrainConfig,
)

__all__ = [
    "CRITERION_NUMBERS",
    "DEFAULT_CONFIG",
    "SEED2019",
    "SEED2019_PRUNE",
    "BatchSizes",
    "BenchConfig",
    "Budget",
    "ComputeConfig",
    "DataConfig",
    "ExportConfig",
    "FinetuneConfig",
    "Fp16Limits",
    "Int8Limits",
    "ModelConfig",
    "ParityLimits",
    "Precision",
    "PrecisionLimits",
    "PruneConfig",
    "RunConfig",
    "Runtime",
    "SaveConfig",
    "TrainConfig",
    "load_config",
    "register_reader",
    "save_config",
]
