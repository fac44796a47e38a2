"""Bad arguments get one ValueError that names the field and what would be right.

Called as by a user, without the test suite's run-time shape checks, which would come first.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from op_cases import BLOCK_SIZE, PACKED, TOP_K, arbitrary_blocks, index_inputs, main_inputs

import pallas_kernels
from pallas_kernels import BlockSelection

OPS = (
    "select_blocks",
    "sparse_attention",
    "dense_attention",
    "index_kl",
    "select_pattern",
    "main_block_mass",
)
WITH_BLOCKS = tuple(op for op in OPS if op != "dense_attention")
WITH_HEADS = tuple(op for op in OPS if op != "select_blocks")


@pytest.fixture(autouse=True)
def no_shape_checks(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def call(op, **changes):
    """Runs an op with good arguments but for `changes`."""
    q, k, v = main_inputs("float32")
    index_q, index_k = index_inputs("float32")
    block_ids = jnp.asarray(changes.pop("block_ids", arbitrary_blocks(PACKED)))
    selection = BlockSelection(block_ids, changes.get("block_size", BLOCK_SIZE))
    blocks = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
    arguments = {
        "select_blocks": {"index_q": index_q, "index_k": index_k} | blocks,
        "sparse_attention": {"q": q, "k": k, "v": v, "selection": selection},
        "dense_attention": {"q": q, "k": k, "v": v},
        "index_kl": {
            "q": q,
            "k": k,
            "index_q": index_q,
            "index_k": index_k,
            "selection": selection,
        },
        "select_pattern": {"pattern": "strided", "q": q, "k": k} | blocks,
        "main_block_mass": {"q": q, "k": k, "block_size": BLOCK_SIZE},
    }[op]
    if "selection" in arguments:
        changes.pop("block_size", None)
    return getattr(pallas_kernels, op)(**arguments | changes)


def refusal(op, **changes):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the message
        call(op, **changes)
    return str(error.value)


def accepts(op, segment_ids):
    return jax.eval_shape(lambda: call(op, segment_ids=segment_ids))


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_pass(op):
    assert accepts(op, jnp.asarray(PACKED.segment_ids))


@pytest.mark.fast
@pytest.mark.parametrize("op", WITH_HEADS)
def test_heads(op):
    assert "num_heads=4 is not a multiple of num_kv_heads=3" in refusal(op, k=zeros(2, 61, 3, 8))
    for k in (zeros(3, 61, 2, 8), zeros(2, 61, 2, 6)):
        message = refusal(op, k=k)
        assert str(k.shape) in message
        assert "the same B and D" in message
    assert "must be [B, T, Hq, D]" in refusal(op, q=zeros(61, 4, 8))
    assert "[B, S, Hkv, D]" in refusal(op, k=zeros(2, 61, 8))


@pytest.mark.parametrize("op", ["sparse_attention", "dense_attention"])
def test_values(op):
    for v in (zeros(2, 60, 2, 8), zeros(2, 61, 1, 8), zeros(2, 61, 2, 4)):
        assert f"v is {v.shape}, it must have the shape of k" in refusal(op, v=v)


@pytest.mark.parametrize("op", ["select_blocks", "index_kl"])
def test_index_arrays(op):
    for bad in (
        {"index_q": zeros(2, 61, 4)},
        {"index_k": zeros(2, 61, 2, 4)},
        {"index_k": zeros(2, 61, 5)},
        {"index_k": zeros(1, 61, 4)},
    ):
        message = refusal(op, **bad)
        assert "index_q and index_k must be [B, T, Hkv, Di] and [B, S, Di]" in message
        assert str(next(iter(bad.values())).shape) in message


def test_an_index_head_for_every_group():
    """One that broadcasts over the groups, most of all."""
    for index_q in (zeros(2, 61, 1, 4), zeros(2, 60, 2, 4)):
        message = refusal("index_kl", index_q=index_q)
        assert f"index_q {index_q.shape}" in message
        assert "Hkv" in message
    message = refusal("index_kl", index_k=zeros(2, 60, 4))
    assert "index_k (2, 60, 4)" in message


def test_weights_and_log_sum_exps_of_other_queries():
    for weights in (zeros(2, 61, 2), zeros(2, 1, 61), zeros(61)):
        message = refusal("index_kl", weights=weights)
        assert f"weights has shape {weights.shape}, expected [B, Hkv, T] = (2, 2, 61)" in message
    lse = zeros(2, 2, 61)
    message = refusal("index_kl", main_lse=lse)
    assert f"main_lse has shape {lse.shape}, expected [B, Hq, T] = (2, 4, 61)" in message


@pytest.mark.parametrize("op", ["sparse_attention", "index_kl"])
def test_selection_of_other_arrays(op):
    block_ids = arbitrary_blocks(PACKED)
    for bad in (block_ids[:1], block_ids[:, :1], block_ids[:, :, :30], block_ids[0]):
        message = refusal(op, block_ids=bad)
        assert f"selection.block_ids is {bad.shape}" in message
        assert "(B, Hkv, T) = (2, 2, 61)" in message


@pytest.mark.parametrize("op", ["select_blocks", "select_pattern"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_blocks": 0}, "num_local_blocks=0 must be >= 1"),
        ({"num_sink_blocks": -1}, "num_sink_blocks=-1 must be >= 0"),
        ({"top_k": 0}, "top_k=0 must hold the 1 forced blocks"),
        ({"num_local_blocks": 2, "num_sink_blocks": 2}, "top_k=3 must hold the 4 forced blocks"),
    ],
)
def test_forced_blocks(op, changes, message):
    assert message in refusal(op, **changes)


@pytest.mark.parametrize("op", WITH_BLOCKS)
def test_block_size(op):
    assert "block_size=0 must be >= 1" in refusal(op, block_size=0)


def test_names():
    assert "pooling='median': choose one of max, lse, mean" in refusal(
        "select_blocks", pooling="median"
    )
    message = refusal("select_blocks", index_precision="int4")
    assert "index_precision='int4': choose one of native, int8" in message
    message = refusal("select_pattern", pattern="bigbird")
    choices = "strided, random, random_per_block, sink_window, oracle"
    assert f"pattern='bigbird': choose one of {choices}" in message


def test_window():
    assert "window=-1 must be >= 1, or 0" in refusal("dense_attention", window=-1)


@pytest.mark.parametrize("op", OPS)
def test_slots(op):
    for offset in (1, -1):
        message = refusal(op, query_offset=offset)
        assert f"61 queries at query_offset={offset}" in message
        assert "there are 61" in message
    message = refusal(op, segment_ids=jnp.ones((2, 60), jnp.int32))
    assert "segment_ids is (2, 60), it must be [B, S] = (2, 61)" in message
    assert "segment_ids is (1, 61)" in refusal(op, segment_ids=jnp.ones((1, 61), jnp.int32))


@pytest.mark.fast
@pytest.mark.parametrize("op", WITH_BLOCKS)
def test_documents_off_a_block_boundary(op):
    shifted = np.array(PACKED.segment_ids)
    shifted[1] = np.roll(shifted[1], 1)  # left padding of one token
    message = refusal(op, segment_ids=jnp.asarray(shifted))
    assert "segment_ids: the document at row 1, slot 1" in message
    assert "multiple of block_size=8" in message
    assert "left padding: pad on the right" in message
    dense = np.ones((2, 61), np.int32)
    dense[0, 12:] = 2
    message = refusal(op, segment_ids=jnp.asarray(dense))
    assert "the document at row 0, slot 12" in message
    assert "pad each document to a multiple of block_size" in message


def test_left_padding_of_whole_blocks_shifts_nothing():
    shifted = np.roll(PACKED.segment_ids, BLOCK_SIZE, axis=1)
    shifted[:, :BLOCK_SIZE] = 0
    shifted[1] = np.repeat([0, 1, 2], [16, 8, 37])
    for op in WITH_BLOCKS:
        assert accepts(op, jnp.asarray(shifted))


def test_traced_segment_ids_have_no_values_to_check():
    shifted = jnp.asarray(np.roll(PACKED.segment_ids, 1, axis=1))
    assert jax.eval_shape(lambda ids: call("select_blocks", segment_ids=ids), shifted)
