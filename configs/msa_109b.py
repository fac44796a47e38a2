"""The paper's main model: 109B parameters, 6B active, 41 layers with 128 experts each.

Command (put your own text and tokenizer in place of `corpus`):

    python -m experiments.train --config=configs/msa_109b.py --workdir=runs/msa_109b \\
        --config.data.files='corpus/*.parquet' --config.data.tokenizer=corpus/tokenizer.json

and the same with `configs/msa_109b.py:gqa` for the dense twin.

Hardware: 64 H200 or a TPU v5p slice of 128 chips. Parameters, gradients and AdamW state take 16
bytes each in float32, 1.7 TB in all.
Expected result: the paper finds MSA's language-model loss indistinguishable from GQA's, and
attention 28.4 times cheaper at 1M tokens. We have not run this configuration.

The paper publishes neither the experts' width nor the dense feed-forward's nor whether embeddings
are tied: an inner width of 2304, 2 x d_model for the dense layers (as in MiniMax-M3) and untied
embeddings come within 2 % of 109B. The optimizer settings are ours.
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
            d_model=3072,
            num_layers=41,
            num_dense_layers=3,
            ffn_dim=6144,
            remat="full",
        ),
        attention=AttentionConfig(num_heads=64, num_kv_heads=4, head_dim=128, rope_dim=64),
        moe=MoEConfig(num_experts=128, top_k=4, num_shared_experts=1, expert_dim=2304),
        data=DataConfig(
            source="files",
            files="corpus/*.parquet",
            tokenizer="corpus/tokenizer.json",
            sequence_length=8192,
            batch_size=1024,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000, accumulation_steps=8),
        # 8.4M tokens a step: the paper's 3T tokens, of which 40B warm up the index branch.
        objective=ObjectiveConfig(index_warmup_steps=4_770),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        train=TrainConfig(steps=357_600, eval_every=2000, checkpoint_every=1000),
    )
    return select_variant(config, arg)
