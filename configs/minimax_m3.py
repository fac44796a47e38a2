"""MiniMax-M3, the released text model: 426B parameters, 23.5B active, 60 layers.

Command (put your own text in place of `corpus`; the tokenizer is the released one):

    python -m experiments.train --config=configs/minimax_m3.py --workdir=runs/minimax_m3 \\
        --config.data.files='corpus/*.parquet' --config.data.tokenizer=corpus/tokenizer.json

and the same with `configs/minimax_m3.py:gqa` for the dense twin.

Hardware: 128 H200. Parameters, gradients and AdamW state take 16 bytes each in float32, 6.8 TB in
all.
Expected result: the architecture of the released checkpoint: layers 0-2 have
full attention and a dense feed-forward, layers 3-59 are MSA with experts. We have not trained
this configuration, and the settings beyond the architecture are ours.
"""

import ml_collections

from configs import select_variant
from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig
from msa_jax.train.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The run's configuration; `arg` "gqa" gives the dense twin."""
    config = ExperimentConfig(
        model=ModelConfig(
            vocab_size=200_064,
            d_model=6144,
            num_layers=60,
            num_dense_layers=3,
            num_full_attention_layers=3,
            ffn_dim=12_288,
            activation="swiglu_oai",
            remat="full",
        ),
        attention=AttentionConfig(
            num_heads=64, num_kv_heads=4, head_dim=128, rope_dim=64, rope_theta=5e6
        ),
        moe=MoEConfig(
            num_experts=128, top_k=4, num_shared_experts=1, expert_dim=3072, routed_scale=2.0
        ),
        data=DataConfig(
            source="files",
            files="corpus/*.parquet",
            tokenizer="corpus/tokenizer.json",
            sequence_length=32_768,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=500, accumulation_steps=2),
        objective=ObjectiveConfig(),
        mesh=MeshConfig(data=1, fsdp=-1, expert=16),
        train=TrainConfig(steps=10_000, eval_every=500, checkpoint_every=500),
    )
    return select_variant(config, arg)
