"""A small MSA mixture-of-experts model on the standard library's sources: minutes on a CPU.

Command, for this model and its dense twin, the comparison and the report:

    make quickstart

or one model alone:

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart/msa
    python -m experiments.train --config=configs/quickstart.py:gqa --workdir=runs/quickstart/gqa

Hardware: any machine with 2 cores and 4 GB of memory.
Expected result: the validation loss of the MSA model is within 2 % of its dense twin's.
"""

import ml_collections

from configs import select_variant
from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.train.config import (
    DataConfig,
    ExperimentConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The run's configuration; `arg` "gqa" gives the dense twin."""
    config = ExperimentConfig(
        model=ModelConfig(
            vocab_size=ByteTokenizer.vocab_size,
            d_model=128,
            num_layers=4,
            tie_embeddings=True,
            compute_dtype="float32",  # CPUs emulate bfloat16
        ),
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope_dim=16,
            rope_theta=1e4,
            block_size=16,
            top_k=8,  # 128 of the 512 tokens
            index_dim=32,
        ),
        # A run this short needs its experts balanced faster than one of a million steps.
        moe=MoEConfig(
            num_experts=8, top_k=2, num_shared_experts=1, expert_dim=128, bias_update_rate=0.01
        ),
        data=DataConfig(source="stdlib", sequence_length=512, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=40, decay_fraction=0.3),
        objective=ObjectiveConfig(index_warmup_steps=80),
        train=TrainConfig(steps=400, log_every=5, eval_every=80, checkpoint_every=200),
    )
    return select_variant(config, arg)
