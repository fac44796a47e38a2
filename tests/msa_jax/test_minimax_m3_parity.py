"""The modules against the MiniMax-M3 model of transformers (`tests/goldens/make_minimax_m3.py`)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax.attention import GQAttention, Mode, msa
from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig
from msa_jax.model import Block, Transformer, plan_stages
from msa_jax.nn.moe import MoE
from pallas_kernels import BlockSelection

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
DECODER = "language_model.model."
NUM_EXPERTS = 8
GROUPS = (2, 4)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def load(name):
    return dict(np.load(GOLDENS / name))


def attention_golden(num_groups):
    return load(f"minimax_m3_attention_{num_groups}_groups.npz")


def assert_parity(actual, golden, name):
    """float64 to its rounding. float32 to rounding too, from both results of the reference.

    The atol is a share of the largest entry: an entry near 0 is a difference of larger ones.
    """
    for reference in ("float64",) if actual.dtype == np.float64 else ("float64", "float32"):
        expected = golden[f"{name}.{reference}"]
        rtol, share = (1e-5, 2e-6) if actual.dtype == np.float32 else (1e-12, 1e-13)
        np.testing.assert_allclose(
            actual, expected, rtol=rtol, atol=share * np.abs(expected).max(), err_msg=reference
        )


def without_values(make):
    """The module that `make(rngs)` builds, shapes alone: a weight left out fails its first use."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def put(param, array):
    """Sets a parameter; to numpy, which casts and stacks without compiling anything."""
    assert param.shape == array.shape
    param.set_value(array.astype(param.dtype))


@jax.jit
def run(module, *inputs):
    return module(*inputs)


def put_attention(attention, weights, prefix=""):
    """Loads released weights, stored [out, in], into MSAttention or GQAttention."""

    def projections(module, names):
        for ours, name in names.items():
            param = getattr(module, ours)
            put(param, weights[f"{prefix}{name}_proj.weight"].T.reshape(param.shape))

    def norms(module, name):
        put(module.q_norm.weight, weights[f"{prefix}{name}q_norm.weight"])
        put(module.k_norm.weight, weights[f"{prefix}{name}k_norm.weight"])

    projections(attention.main, {"q": "q", "k": "k", "v": "v", "o": "o"})
    norms(attention.main, "")
    if not isinstance(attention, GQAttention):
        projections(attention.index, {"q": "index_q", "k": "index_k"})
        norms(attention.index, "index_")


def put_feed_forward(ffn, weights, prefix):
    for name in ("gate", "up", "down"):
        put(getattr(ffn, name), weights[f"{prefix}{name}_proj.weight"].T)


def put_experts(moe, weights, prefix):
    put(moe.router, weights[f"{prefix}gate.weight"].T)
    put(moe.selection_bias, weights[f"{prefix}e_score_correction_bias"])
    for ours, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        experts = [weights[f"{prefix}experts.{e}.{name}.weight"].T for e in range(NUM_EXPERTS)]
        put(getattr(moe, ours), np.stack(experts))
    put_feed_forward(moe.shared, weights, f"{prefix}shared_experts.")


def put_block(block, weights, prefix):
    put(block.mixer_norm.weight, weights[f"{prefix}input_layernorm.weight"])
    put(block.ffn_norm.weight, weights[f"{prefix}post_attention_layernorm.weight"])
    put_attention(block.mixer, weights, f"{prefix}self_attn.")
    if isinstance(block.feed_forward, MoE):
        put_experts(block.feed_forward, weights, f"{prefix}block_sparse_moe.")
    else:
        put_feed_forward(block.feed_forward, weights, f"{prefix}mlp.")


def attention_config(**changes):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "rope_dim": 16, "index_dim": 16}
    # The goldens' RoPE base: every frequency is a power of two.
    selection = {"rope_theta": 2.0**16, "block_size": 8, "top_k": 4}
    return AttentionConfig(**(sizes | selection | changes))


def attention_layer(golden, dtype):
    num_groups = golden["block_ids"].shape[1]
    config = attention_config(
        num_kv_heads=num_groups, index_dim=golden["index_q_norm.weight"].shape[0]
    )
    d_model = golden["x"].shape[-1]
    attention = without_values(
        lambda rngs: msa.MSAttention(config, d_model, dtype=dtype, param_dtype=dtype, rngs=rngs)
    )
    put_attention(attention, golden)
    return attention


@pytest.mark.parametrize("num_groups", GROUPS)
def test_attention_layer(num_groups, dtype):
    """Projections, norms, RoPE, selection and output; no score of the golden is near a tie."""
    golden = attention_golden(num_groups)
    out = run(attention_layer(golden, dtype), golden["x"].astype(dtype))
    np.testing.assert_array_equal(out.shared.block_ids, golden["block_ids"])
    assert_parity(out.y, golden, "y")


def selection_of_the_best_head(index_q, index_k, *, block_size, top_k, **_):
    """The error of several public ports: a max over index heads, one selection for all groups."""
    num_keys, num_groups = index_k.shape[1], index_q.shape[2]
    scores = jnp.einsum("btri,bsi->brts", index_q, index_k).max(1)
    slots = jnp.arange(num_keys)
    scores = jnp.where(slots <= slots[:, None], scores, -jnp.inf)
    padding = -num_keys % block_size
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = scores.reshape(*scores.shape[:2], -1, block_size).max(-1)
    num_blocks = blocks.shape[-1]
    own = slots[:, None] // block_size == jnp.arange(num_blocks)
    best, ids = jax.lax.top_k(jnp.where(own, jnp.inf, blocks), top_k)
    ids = jnp.sort(jnp.where(best == -jnp.inf, num_blocks, ids), axis=-1)
    ids = jnp.where(ids == num_blocks, -1, ids)
    return BlockSelection(jnp.stack([ids] * num_groups, axis=1), block_size)


@pytest.mark.parametrize("num_groups", GROUPS)
def test_one_selection_for_all_groups_is_far_off(num_groups, monkeypatch):
    golden = attention_golden(num_groups)
    attention = attention_layer(golden, "float32")
    monkeypatch.setattr(msa, "select_blocks", selection_of_the_best_head)
    x = golden["x"].astype("float32")
    out = jax.jit(lambda layer, x: layer(x))(attention, x)  # not `run`: it may remember the op

    # The first 4 blocks of queries see no more than 4 blocks, so there every rule agrees.
    agree = (out.shared.block_ids == golden["block_ids"]).all(-1)
    assert agree[:, :, :32].all()
    assert agree[:, :, 32:].mean() < 0.5
    error = np.abs(out.y - golden["y.float64"])
    assert error[:, :32].max() < 1e-5
    assert error[:, 32:].mean() > 0.1 * np.abs(golden["y.float64"]).mean()
    with pytest.raises(AssertionError):
        assert_parity(out.y, golden, "y")


def architecture(dtype):
    return ArchitectureConfig(
        model=ModelConfig(
            vocab_size=56,
            d_model=40,
            num_layers=3,
            num_dense_layers=1,
            num_full_attention_layers=1,
            ffn_dim=48,
            activation="swiglu_oai",
            compute_dtype=dtype,
            param_dtype=dtype,
        ),
        attention=attention_config(num_local_blocks=2),
        moe=MoEConfig(num_experts=NUM_EXPERTS, top_k=3, expert_dim=20, routed_scale=2.0),
    )


def experts_layer(golden, dtype):
    options = {"activation": "swiglu_oai", "dtype": dtype, "param_dtype": dtype}
    d_model = golden["x"].shape[-1]
    moe = without_values(lambda rngs: MoE(architecture(dtype).moe, d_model, **options, rngs=rngs))
    put_experts(moe, golden, f"{DECODER}layers.1.block_sparse_moe.")
    return moe


def test_mixture_of_experts(dtype):
    """Router with a correction bias, renormalised and scaled weights, clamps, shared expert."""
    golden = load("minimax_m3_model.npz")
    y = run(experts_layer(golden, dtype), golden["x"].astype(dtype)).y
    assert_parity(y, golden, "moe.y")


def test_the_correction_bias_decides_some_choices():
    golden = load("minimax_m3_model.npz")
    moe = experts_layer(golden, "float32")
    put(moe.selection_bias, np.zeros(NUM_EXPERTS))
    y = run(moe, golden["x"].astype("float32")).y
    rerouted = np.abs(y - golden["moe.y.float64"]).max(-1) > 1e-3
    assert 0.1 < rerouted.mean() < 0.9


def decoder_block(kind, layer, golden, dtype):
    block = without_values(lambda rngs: Block(kind, architecture(dtype), rngs=rngs))
    put_block(block, golden, f"{DECODER}layers.{layer}.")
    return block


def transformer(golden, dtype):
    """The model with released weights; stages hold equal neighbouring layers, stacked."""
    model = without_values(lambda rngs: Transformer(architecture(dtype), rngs=rngs))
    put(model.embedding.table, golden[f"{DECODER}embed_tokens.weight"])
    put(model.embedding.head, golden["language_model.lm_head.weight"].T)
    put(model.final_norm.weight, golden[f"{DECODER}norm.weight"])
    layer = 0
    for index, ((kind,), repeats) in enumerate(model.plan):
        blocks = [decoder_block(kind, layer + i, golden, dtype) for i in range(repeats)]
        model.stages[index] = nnx.List([jax.tree.map(lambda *ws: np.stack(ws), *blocks)])
        layer += repeats
    return model


def test_decoder_layer(dtype):
    golden = load("minimax_m3_model.npz")
    (kind,) = plan_stages(architecture(dtype))[1].kinds
    block = decoder_block(kind, 1, golden, dtype)
    nothing = dict.fromkeys(("positions", "segment_ids", "cache", "shared"))
    call = jax.jit(lambda block, x: block(x, **nothing, mode=Mode())[0])
    assert_parity(call(block, golden["x"].astype(dtype)), golden, "layer.y")


def test_tokens_to_logits(dtype):
    """One dense layer, two with sparse attention and experts; two local blocks."""
    golden = load("minimax_m3_model.npz")
    logits = run(transformer(golden, dtype), golden["tokens"]).logits
    assert_parity(logits, golden, "logits")
