"""MSA against the mixers that it is compared with: 35M parameters, 8K tokens of context.

Command, for one of msa, gqa, mha, sliding_window, longformer, bigbird, mla, linear and mamba2:

    export XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
    python -m experiments.train --config=configs/comparison.py --workdir=runs/comparison/msa_0
    python -m experiments.train --config=configs/comparison.py:gqa --workdir=runs/comparison/gqa_0

and for a second seed --config.train.seed=1 --config.data.seed=1. All see the same rows in the same
order, half of them Python sources and half synthetic retrieval documents, so that needles and the
tasks of `experiments.evaluate` are in reach of a model this small. Two more choices are there for
that: many short steps, on rows of 1K first, and a RoPE base that leaves fast rotations in a head,
as heads that look one token back need them.

Sizes are matched by `msa_jax.matching`: every feed-forward is as wide as it takes for MSA's number
of parameters. Sliding window attention then gets as many tokens as cost MSA's training FLOPs;
Longformer and BigBird have MSA's 16 blocks, one of them a sink, and BigBird five drawn ones.

`configs/comparison.py:cpt` is MSA by continued pretraining (MSA-CPT): 500 steps from the GQA model
of seed 0, which `configs/sweeps` starts from too.

Hardware: one GPU of 80 GB. Peaks of 2.7 GB (GQA) to 4.4 (MSA): several runs share it.
Expected result: validation losses of 0.556 (MSA), 0.558 (GQA), 0.568 (sliding window) and 0.708
(Mamba-2) with seed 0; see docs/results.md.
"""

import dataclasses
from typing import Any

import ml_collections

from msa_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.matching import match
from msa_jax.mixer_config import MLAConfig
from msa_jax.train.config import (
    DataConfig,
    ExperimentConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    to_config_dict,
)

_LENGTH = 8192

# What a kind needs beside its name.
_FIELDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {},
    "sliding_window": {"window": 1024},
    "longformer": {"num_sink_blocks": 1},
    "bigbird": {"num_sink_blocks": 1, "num_random_blocks": 5},
    "mla": {"mla": MLAConfig(latent_dim=128, rope_head_dim=32)},
    "linear": {},
    "mamba2": {},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The run's configuration; `arg` names the mixer, "" is MSA, "cpt" MSA from the GQA model."""
    config = ExperimentConfig(
        model=ModelConfig(
            vocab_size=ByteTokenizer.vocab_size,
            d_model=640,
            num_layers=8,
            ffn_dim=1792,
            tie_embeddings=True,
            remat="dots",
        ),
        attention=AttentionConfig(
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            rope_dim=64,
            rope_theta=1e4,
            block_size=64,
            top_k=16,  # an eighth of the context
            index_dim=64,
        ),
        moe=MoEConfig(num_experts=0),
        data=DataConfig(
            source="stdlib",
            sequence_length=_LENGTH,
            join_documents=True,
            warmup_length=1024,
            length_warmup_steps=2000,
            batch_size=2,
            retrieval_task="mixture",
            retrieval_share=0.5,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, decay_fraction=0.3),
        objective=ObjectiveConfig(index_warmup_steps=2300),
        # 16,384 tokens a step, 56M in all.
        train=TrainConfig(
            steps=3400,
            log_every=20,
            eval_every=1000,
            eval_batches=16,
            checkpoint_every=1000,
            keep_checkpoints=2,
            prefetch_batches=64,  # those of a pool of rows
        ),
    )
    if arg not in ("", "cpt", *_FIELDS):
        raise ConfigError(
            f"config argument {arg!r}: use no argument for MSA, or one of {', '.join(_FIELDS)}, cpt"
        )
    if arg == "cpt":
        return to_config_dict(_continued(_matched(config, "gqa")))
    return to_config_dict(_matched(config, arg) if arg else config)


def _matched(msa: ExperimentConfig, kind: str) -> ExperimentConfig:
    """The model with another mixer, as large as MSA's."""
    fields: dict[str, Any] = {"kind": kind, **_FIELDS[kind]}
    attention = dataclasses.replace(msa.attention, **fields)
    config = match(dataclasses.replace(msa, attention=attention), msa, by="params").config
    if kind == "sliding_window":
        config = match(config, msa, by="flops", length=_LENGTH, field="attention.window").config
    return config


def _continued(gqa: ExperimentConfig) -> ExperimentConfig:
    """MSA from the trained GQA model: the sources in another order, other synthetic documents."""
    return dataclasses.replace(
        gqa,
        attention=dataclasses.replace(gqa.attention, kind="msa"),
        data=dataclasses.replace(gqa.data, length_warmup_steps=0, seed=2),
        optimizer=dataclasses.replace(gqa.optimizer, learning_rate=5e-4, warmup_steps=50),
        objective=ObjectiveConfig(index_warmup_steps=150),
        train=dataclasses.replace(
            gqa.train,
            steps=500,
            eval_every=0,
            checkpoint_every=250,
            keep_checkpoints=1,
            init_from="runs/comparison/gqa_0",
        ),
    )
