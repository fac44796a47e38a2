"""The paper's pilot: 10.5B parameters, 1.5B active, 16 layers with 64 experts each.

Command (put your own text and tokenizer in place of `corpus`):

    python -m experiments.train --config=configs/pilot_10b.py --workdir=runs/pilot \\
        --config.data.files='corpus/*.parquet' --config.data.tokenizer=corpus/tokenizer.json

and the same with `configs/pilot_10b.py:gqa` for the dense twin.

Hardware: one node of 8 H100 or H200. Parameters, gradients and AdamW state take 16 bytes each in
float32, 168 GB in all, so they are sharded over every device.
Expected result: the paper finds MSA's language-model loss indistinguishable from GQA's, with a
score recall of 0.90-0.94 and a block recall of 0.70-0.75. We have not run this configuration.

The shapes are the paper's; it publishes no optimizer settings, so those are ours.
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
            vocab_size=200_000,
            d_model=2048,
            num_layers=16,
            tie_embeddings=True,
            remat="attention",
        ),
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, rope_dim=64),
        moe=MoEConfig(num_experts=64, top_k=4, num_shared_experts=1, expert_dim=1536),
        data=DataConfig(
            source="files",
            files="corpus/*.parquet",
            tokenizer="corpus/tokenizer.json",
            sequence_length=8192,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, accumulation_steps=16),
        # 2.1M tokens a step: 105B in all, the first 1.3 % with dense attention as in the paper.
        objective=ObjectiveConfig(index_warmup_steps=670),
        mesh=MeshConfig(data=1, fsdp=-1),
        train=TrainConfig(steps=50_000, eval_every=1000, checkpoint_every=1000),
    )
    return select_variant(config, arg)
