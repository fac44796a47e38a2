"""Checkpoints of untrained toy models, as a finished run leaves them; made without compiling."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig
from msa_jax.train.checkpoint import Checkpointer
from msa_jax.train.config import DataConfig, ExperimentConfig
from msa_jax.train.state import abstract_model

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=256, d_model=16, num_layers=2, ffn_dim=16, compute_dtype="float32"
    ),
    attention=AttentionConfig(
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        rope_dim=4,
        rope_theta=1e4,
        block_size=8,
        top_k=3,
        index_dim=4,
    ),
    moe=MoEConfig(num_experts=0),
    data=DataConfig(source="files", files="*.txt", sequence_length=64, batch_size=1),
)


def tiny_config(files: str, kind: str = "msa") -> ExperimentConfig:
    """The toy model on a corpus of its own."""
    return dataclasses.replace(
        CONFIG,
        attention=dataclasses.replace(CONFIG.attention, kind=kind),
        data=dataclasses.replace(CONFIG.data, files=files),
    )


def save_tiny_run(
    folder: pathlib.Path, config: ExperimentConfig, steps: tuple[int, ...] = (1, 2)
) -> None:
    """Saves a checkpoint with other random parameters for each step."""
    _, params, variables = nnx.split(abstract_model(config), nnx.Param, ...)
    with Checkpointer(folder, keep=len(steps)) as checkpointer:
        for step in steps:
            rng = np.random.default_rng(step)

            def draw(leaf, rng=rng):
                return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

            state = jax.tree.map(draw, {"params": params, "variables": variables})
            checkpointer.save(step, state, {}, config)
            checkpointer.wait()


def write_corpus(folder: pathlib.Path, *, files: int = 12, words: int = 400) -> str:
    """A glob of small text files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vocabulary = ["alpha", "beta", "gamma", "delta", "return", "x = 1", "(y)"]
    for index in range(files):
        lines = [" ".join(rng.choice(vocabulary, 8)) for _ in range(words // 8)]
        (folder / f"{index}.txt").write_text("\n".join(lines), encoding="utf-8")
    return f"{folder}/*.txt"
