"""The ops against flash-msa's eager PyTorch models (`tests/goldens/make_flash_msa.py`)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockSelection,
    dense_attention,
    index_kl,
    select_blocks,
    sparse_attention,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "flash_msa.npz")
BLOCK_SIZE, TOP_K = 128, 2
# flash-msa scales index scores by the main branch's head dim, whatever the index dim.
INDEX_SCALE = GOLDEN["q"].shape[-1] ** -0.5
SUPPORTS = ("sparse", "dense")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def arrays(dtype, *names):
    return [jnp.asarray(GOLDEN[name], dtype) for name in names]


def golden_selection():
    return BlockSelection(jnp.asarray(GOLDEN["sparse.block_ids"], jnp.int32), BLOCK_SIZE)


def assert_parity(actual, name):
    """float32: to rounding. float64: to the golden's own rounding, which is to float32."""
    golden = GOLDEN[name].astype(np.float64)
    rtol, atol = {"float32": (1e-5, 1e-6), "float64": (1e-7, 1e-13)}[str(actual.dtype)]
    np.testing.assert_allclose(actual, golden, rtol=rtol, atol=atol * np.abs(golden).max())


def test_select_blocks_chooses_what_flash_msa_chooses(dtype):
    index_q, index_k = arrays(dtype, "index_q", "index_k")
    select = jax.jit(functools.partial(select_blocks, block_size=BLOCK_SIZE, top_k=TOP_K))
    selection = select(index_q, index_k)
    np.testing.assert_array_equal(selection.block_ids, GOLDEN["sparse.block_ids"])


def test_the_golden_can_tell_a_shared_selection_from_one_per_group():
    groups = GOLDEN["sparse.block_ids"][0]
    assert (groups[0] != groups[1]).any(-1).mean() > 0.1


def attend(support, q, k, v):
    if support == "dense":
        return dense_attention(q, k, v)
    return sparse_attention(q, k, v, golden_selection())[0]


@pytest.mark.parametrize("support", SUPPORTS)
def test_attention_and_its_gradients(support, dtype):
    q, k, v, do = arrays(dtype, "q", "k", "v", "do")

    @jax.jit
    def with_gradients(do, *qkv):
        o, pullback = jax.vjp(functools.partial(attend, support), *qkv)
        return o, pullback(do)

    o, gradients = with_gradients(do, q, k, v)
    assert_parity(o, f"{support}.o")
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert_parity(gradient, f"{support}.{name}")


def mean_kl(support, q, k, index_q, index_k, index_scale=INDEX_SCALE):
    selection = None if support == "dense" else golden_selection()
    return index_kl(q, k, index_q, index_k, selection, index_scale=index_scale).loss


@pytest.mark.parametrize("support", SUPPORTS)
def test_index_kl_and_its_gradients(support, dtype):
    q, k, index_q, index_k = arrays(dtype, "q", "k", "index_q", "index_k")
    loss = functools.partial(mean_kl, support)
    kl, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, index_q, index_k)
    # The kl of a row is a difference of sums of a few nats: its rounding is relative to those.
    np.testing.assert_allclose(
        kl, GOLDEN[f"{support}.kl"], rtol=1e-6 if dtype == "float32" else 1e-13
    )
    dq, dk, dindex_q, dindex_k = gradients
    assert_parity(dindex_q, f"{support}.dindex_q")
    assert_parity(dindex_k, f"{support}.dindex_k")
    np.testing.assert_array_equal(dq, 0)
    np.testing.assert_array_equal(dk, 0)


@pytest.mark.parametrize("support", SUPPORTS)
def test_index_scale_is_one_over_the_root_of_the_index_dim(support):
    """The default scale, by index queries that are larger by the ratio of the two scales."""
    with jax.enable_x64(True):
        q, k, index_q, index_k = arrays("float64", "q", "k", "index_q", "index_k")
        index_q = index_q * INDEX_SCALE * index_q.shape[-1] ** 0.5
        loss = jax.jit(functools.partial(mean_kl, support, index_scale=None))
        kl = loss(q, k, index_q, index_k)
    np.testing.assert_allclose(kl, GOLDEN[f"{support}.kl"], rtol=1e-13)
