"""350M parameters, 24 layers, 32K tokens of context: what training with MSA gains on one H100.

Command, for this model and its dense twin:

    export XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
    python -m experiments.train --config=configs/h100_350m.py --workdir=runs/h100_350m/msa
    python -m experiments.train --config=configs/h100_350m.py:gqa --workdir=runs/h100_350m/gqa

The flag keeps XLA from tuning Triton kernels around the float32 products of the diagnostics. For a
profile add --config.train.profile_steps=3 and run `python -m experiments.profile_table` on the run.

Hardware: one H100 of 80 GB. Parameters, gradients, their sum over two micro-batches and AdamW state
take 20 bytes each, 7.0 GB. A micro-batch is one row of 32,768 tokens. Of each layer remain its
input (67 MB), block ids and log-sum-exps (2.1 MB each): 1.7 GB in all, and the attention output
(134 MB, 3.2 GB in all) with --config.model.remat=attention. A layer's backward pass has q and o
(134 MB each), the feed-forward's inner arrays (210 MB each) and the partial results of selected
attention (1.1 GB). Logits over 256 bytes are 34 MB a row and need no chunks of the sequence; a
vocabulary of 200,000 would take 26 GB. The peaks were 12.2 GB with MSA and 10.7 GB densely.
Expected result: four and three minutes with the compilation; 80,000 tokens per second with MSA and
32,000 densely. Validation loss 2.568 with MSA and 2.579 densely, after 5M tokens, which is too
early to compare models: docs/benchmarks/h100_350m.md. A token takes 3.3 GFLOP with MSA and 11.7
with dense attention.

Heads are the paper's scaled down: 16 query heads of 128 dims to a group, twice as wide together as
the residual stream. Rows are cut from the standard library's sources joined end to end, each one
document to the model, so that attention has all 32K tokens to choose from.
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
            d_model=1024,
            num_layers=24,
            ffn_dim=3200,
            tie_embeddings=True,
            remat="save_selection",
        ),
        attention=AttentionConfig(
            num_heads=16,
            num_kv_heads=1,
            head_dim=128,
            rope_dim=64,
            block_size=128,
            top_k=16,
            index_dim=128,
        ),
        moe=MoEConfig(num_experts=0),
        data=DataConfig(source="stdlib", sequence_length=32_768, join_documents=True, batch_size=2),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, warmup_steps=20, decay_fraction=0.3, accumulation_steps=2
        ),
        objective=ObjectiveConfig(index_warmup_steps=20),
        # 65,536 tokens a step: 5M in all, half of the 11 MB of sources.
        train=TrainConfig(
            steps=80,
            log_every=5,
            eval_every=50,
            eval_batches=2,
            checkpoint_every=0,
            keep_checkpoints=1,
        ),
    )
    return select_variant(config, arg)
