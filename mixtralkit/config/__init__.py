"""What users and files can say: the model's architecture, the engine's options, their rules, and the shipped files."""

from mixtralkit.config.engine import (
    CacheOptions,
    EngineConfig,
    FasterOptions,
    LimitOptions,
    MoEOptions,
    ParallelOptions,
    SourceOptions,
    TierOptions,
    TopologyOptions,
)  # fmt: skip
from mixtralkit.config.model import DTYPES, ModelConfig, ParallelConfig, parse_dtype
from mixtralkit.config.server import ServerOptions
from mixtralkit.config.shipped import shipped

__all__ = [
    "DTYPES", "CacheOptions", "EngineConfig", "FasterOptions", "LimitOptions", "MoEOptions", "ModelConfig",
    "ParallelConfig", "ParallelOptions", "ServerOptions", "SourceOptions", "TierOptions", "TopologyOptions",
    "parse_dtype", "shipped",
]  # fmt: skip
