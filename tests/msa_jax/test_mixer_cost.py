"""Costs of latent and recurrent mixers: parameters of real models, FLOPs and bytes by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from msa_jax import cost
from msa_jax.attention import build_mixer
from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.model import Transformer

D_MODEL, LAYERS = 12, 3
ATTENTION = AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rope_dim=2,
    mla=MLAConfig(latent_dim=5, rope_head_dim=2, value_dim=3),
    linear=LinearConfig(value_dim=7, conv_width=3),
    mamba2=Mamba2Config(state_dim=5, expand=3, head_dim=6, conv_width=2),
)
CASES = {
    "mla": dataclasses.replace(ATTENTION, kind="mla"),
    "mla with latent queries": dataclasses.replace(
        ATTENTION, kind="mla", mla=MLAConfig(latent_dim=5, rope_head_dim=2, query_latent_dim=9)
    ),
    "linear": dataclasses.replace(ATTENTION, kind="linear"),
    "mamba2": dataclasses.replace(ATTENTION, kind="mamba2"),
}


def model_config(attention, **changes):
    model = ModelConfig(vocab_size=11, d_model=D_MODEL, num_layers=LAYERS, ffn_dim=6, **changes)
    return ArchitectureConfig(model, attention, MoEConfig(num_experts=0))


@pytest.fixture(params=CASES)
def attention(request):
    return CASES[request.param]


@pytest.mark.parametrize("leading", [0, 1])
def test_parameters_are_those_of_the_model(attention, leading):
    """All of them, and those with one axis apart; with and without a leading dense layer."""
    config = model_config(attention, num_full_attention_layers=leading)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = {False: 0, True: 0}
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        sizes[len(leaf.get_metadata("logical_axes")) > 1] += leaf.get_value().size
    count = cost.parameter_count(config)
    assert count.norms == sizes[False]
    assert count.total == sizes[True] + sizes[False]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Scores of 4 + 2 dims and values of 3, 2 heads, every causal pair of 37 tokens.
        ("mla", 2 * 2 * (6 + 3) * 37 * 38 // 2),
        # A state of 4 x 7 for each of 2 heads is read, written and read.
        ("linear", 37 * 2 * 3 * 2 * 4 * 7),
        # A state of 6 x 5 for each of 6 heads is written and read.
        ("mamba2", 37 * 6 * 2 * 2 * 6 * 5),
    ],
)
def test_flops_by_hand(kind, expected):
    flops = cost.attention_flops(CASES[kind], 37, d_model=D_MODEL)
    assert flops == (expected, 0)
    config = model_config(CASES[kind])
    model, parameters = cost.model_flops(config, 37), cost.parameter_count(config)
    assert model.attention == LAYERS * expected
    assert model.projections == 2 * 37 * parameters.attention
    assert cost.training_flops(config, 37).total == 3 * model.total
    sparse, dense = cost.training_flops_per_token(config, 37)
    assert sparse == 3 * model.total / 37 != dense


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("length", [1, 100])
def test_cache_bytes_are_those_of_the_cache(attention, length, dtype):
    """All that one row keeps, without its counters; decoding reads all of it."""
    mixer = nnx.eval_shape(
        lambda: build_mixer(
            attention, D_MODEL, computes_selection=False, dtype=dtype, rngs=nnx.Rngs(0)
        )
    )
    leaves = jax.eval_shape(lambda: jax.tree.leaves(mixer.init_cache(1, length)))
    arrays = [leaf for leaf in leaves if leaf.dtype != np.int32]
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    options = {"dtype_bytes": np.dtype(dtype).itemsize}
    assert cost.decode_bytes(attention, length, d_model=D_MODEL, **options) == expected
    config = model_config(attention)
    assert cost.kv_cache_bytes(config, length, **options) == LAYERS * expected
    assert cost.index_cache_bytes(config, length) == 0


def test_deepseek_v2_keeps_576_numbers_per_token():
    """Its latent of 512 and 64 rotated dims (section 2.1.4)."""
    attention = AttentionConfig(kind="mla")
    assert cost.decode_bytes(attention, 1000) == 2 * 576 * 1000


def test_what_has_no_answer_is_an_error():
    linear, mamba2, mla = (CASES[kind] for kind in ("linear", "mamba2", "mla"))
    assert cost.visible_pairs(mla, 5) == 15
    with pytest.raises(ValueError, match=r"kind='linear': a recurrent mixer has no pairs"):
        cost.visible_pairs(linear, 5)
    with pytest.raises(ValueError, match=r"kind='mla': Eq\. 12 is about MSA and"):
        cost.eq12_flops(mla, 5)
    for function in (cost.attention_flops, cost.decode_bytes):
        with pytest.raises(ValueError, match=r"d_model=None: .*pass config\.model\.d_model"):
            function(mamba2, 5)
