"""MiniMax Sparse Attention for JAX (arXiv 2606.13392).

The public names, loaded when first used: importing `MSAttention` loads no training code.
"""

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "ArchitectureConfig": "msa_jax.config",
    "AttentionConfig": "msa_jax.config",
    "BlockSelection": "pallas_kernels",
    "ConfigError": "msa_jax.config",
    "GQAttention": "msa_jax.attention",
    "KVCache": "msa_jax.cache",
    "MSAttention": "msa_jax.attention",
    "MixerOutput": "msa_jax.attention",
    "MoE": "msa_jax.nn.moe",
    "MoEConfig": "msa_jax.config",
    "Mode": "msa_jax.attention",
    "ModelConfig": "msa_jax.config",
    "PatternAttention": "msa_jax.attention",
    "RMSNorm": "msa_jax.nn.norm",
    "ShardingRules": "msa_jax.sharding",
    "Transformer": "msa_jax.model",
    "generate": "msa_jax.decoding",
}

if TYPE_CHECKING:
    from msa_jax.attention import GQAttention, MixerOutput, Mode, MSAttention, PatternAttention
    from msa_jax.cache import KVCache
    from msa_jax.config import (
        ArchitectureConfig,
        AttentionConfig,
        ConfigError,
        ModelConfig,
        MoEConfig,
    )
    from msa_jax.decoding import generate
    from msa_jax.model import Transformer
    from msa_jax.nn.moe import MoE
    from msa_jax.nn.norm import RMSNorm
    from msa_jax.sharding import ShardingRules
    from pallas_kernels import BlockSelection

__all__ = [
    "ArchitectureConfig",
    "AttentionConfig",
    "BlockSelection",
    "ConfigError",
    "GQAttention",
    "KVCache",
    "MSAttention",
    "MixerOutput",
    "MoE",
    "MoEConfig",
    "Mode",
    "ModelConfig",
    "PatternAttention",
    "RMSNorm",
    "ShardingRules",
    "Transformer",
    "generate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
