"""Whole models on TPUs that are not there: by default all their attention runs in our kernels."""

import collections
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from configs.pilot_10b import get_config
from experiments.compiling.hlo import plain_name, read_hlo
from experiments.compiling.steps import lower_step
from experiments.compiling.targets import parse_target
from msa_jax.train.config import ExperimentConfig, from_config_dict
from msa_jax.train.state import abstract_model
from pallas_kernels import select_blocks, sparse_attention
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu, lower_for_tpu
from pallas_kernels.mosaic_tpu import CHIPS

NUM_LAYERS, LENGTH = 2, 512
FORWARD = {"select_blocks", "sparse_attention_forward"}
BACKWARD = {"sparse_attention_query_gradient", "sparse_attention_key_value_gradient"}
KL = {"index_kl_divergence", "index_kl_index_q_gradient", "index_kl_index_k_gradient"}
NO_CUDA = "cuDNN needs a CUDA device, this is 'cpu'"


def cut_down():
    """The pilot's attention in a small model; rows, tokens and heads are split."""
    config = get_config()
    config.model.update(num_layers=NUM_LAYERS, vocab_size=512, d_model=256, ffn_dim=256)
    config.moe.num_experts = 0
    config.data.update(sequence_length=LENGTH, batch_size=4)
    config.optimizer.accumulation_steps = 1
    config.mesh.update(fsdp=2, tensor=2, context=2)
    return from_config_dict(ExperimentConfig, config)


@pytest.fixture
def log(monkeypatch, caplog):
    """Reads what the ops say that they run as by default."""
    monkeypatch.setattr("pallas_kernels.dispatch._reported", set())  # each line is logged once
    caplog.set_level(logging.INFO, "pallas_kernels")
    return lambda: {r.getMessage() for r in caplog.records if r.name == "pallas_kernels"}


def kernels(*ops):
    """What the log says of ops that no reference runs in place of."""
    return {f"{op} runs as 'mosaic_tpu'" for op in ops}


def kernels_called(lowered):
    """How often the text, in which equal layers are one, calls the kernels by their names."""
    return collections.Counter(re.findall(r'kernel_name = "([^"]*)"', lowered.as_text()))


def kernel_runs(compiled):
    """How often a run of the program runs each kernel."""
    runs = collections.Counter()
    for instruction, times in read_hlo(compiled.as_text()).kernels.items():
        runs[plain_name(instruction)] += times
    return runs


def test_sparse_training_step(log):
    """On a slice each kernel runs once per layer: nothing selects, attends or compares twice."""
    lowered = lower_step(cut_down(), parse_target("tpu-v5p:2x2x2"), "sparse")
    assert log() == kernels("select_blocks", "sparse_attention", "index_kl")
    assert set(kernels_called(lowered)) == FORWARD | BACKWARD | KL
    assert kernel_runs(lowered.compile()) == dict.fromkeys(FORWARD | BACKWARD | KL, NUM_LAYERS)


def test_warmup_training_step(log):
    """Dense attention is XLA's, and its KL over all keys the kernels'."""
    lowered = lower_step(cut_down(), parse_target("tpu-v5p:2x2x2"), "warmup")
    assert log() == kernels("index_kl") | {f"dense_attention runs as 'reference'; {NO_CUDA}"}
    assert set(kernels_called(lowered)) == KL


def test_generating(log):
    """A prompt's tokens, then one token from the cache that they left."""
    model = abstract_model(cut_down())

    def run(model, prompts, token):
        output = model(prompts, cache=model.init_cache(4, LENGTH))
        return model(token, cache=output.cache).logits

    prompts, token = (jax.ShapeDtypeStruct((4, n), jnp.int32) for n in (256, 1))
    lowered = lower_for_tpu(run, model, prompts, token, chip="v5p")
    assert log() == kernels("select_blocks", "sparse_attention")
    assert kernels_called(lowered) == dict.fromkeys(FORWARD, 2)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_decoding_one_token_per_row(paged, chip):
    batch, num_blocks, block_size, dim = 4, 256, 128, 128

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = array(batch, num_blocks * block_size, dim), array(batch, num_blocks * block_size, 4, dim)
    table = None
    if paged:
        table = array(batch, num_blocks, dtype="int32")
        keys = array(1100, block_size, dim), array(1100, 4, block_size, dim)
    queries = array(batch, 1, 4, dim), array(batch, 1, 64, dim)

    def run(queries, keys, query_offset, table):
        (index_q, q), (index_k, k) = queries, keys
        place = {"query_offset": query_offset, "page_table": table}
        selection = select_blocks(index_q, index_k, block_size=block_size, top_k=16, **place)
        return sparse_attention(q, k, k, selection, **place)

    compiled = compile_for_tpu(run, queries, keys, array(batch, dtype="int32"), table, chip=chip)
    assert kernel_runs(compiled) == dict.fromkeys(FORWARD, 1)
