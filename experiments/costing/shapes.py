"""Published estimates of attention's share, and dense models to hold them against."""

import dataclasses

from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig


@dataclasses.dataclass(frozen=True)
class PublishedEstimate:
    """What is commonly said of one context length, each as lowest and highest share of compute."""

    length: int
    attention: tuple[float, float]
    saved: tuple[float, float]


ESTIMATES = (
    PublishedEstimate(8 * 2**10, (0.05, 0.10), (0.01, 0.02)),
    PublishedEstimate(128 * 2**10, (0.30, 0.40), (0.20, 0.25)),
    PublishedEstimate(2**20, (0.60, 0.75), (0.50, 0.60)),
)


def _llama(layers: int, d_model: int, ffn_dim: int, num_heads: int) -> ArchitectureConfig:
    """A dense model's dimensions, with MSA of the paper's blocks in place of its attention."""
    return ArchitectureConfig(
        model=ModelConfig(
            vocab_size=128_256, d_model=d_model, num_layers=layers, ffn_dim=ffn_dim, remat="full"
        ),
        attention=AttentionConfig(
            num_heads=num_heads, num_kv_heads=8, head_dim=128, rope_dim=128, qk_norm=False
        ),
        moe=MoEConfig(num_experts=0),
    )


# Table 3 of The Llama 3 Herd of Models (arXiv 2407.21783).
LLAMA_3 = {
    "Llama 3 8B": _llama(32, 4096, 14_336, 32),
    "Llama 3 70B": _llama(80, 8192, 28_672, 64),
    "Llama 3 405B": _llama(126, 16_384, 53_248, 128),
}
