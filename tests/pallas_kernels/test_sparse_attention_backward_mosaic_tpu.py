"""Gradients of `sparse_attention` on a TPU: interpreted on a CPU, and compiled for every chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from tpu_cases import CASES, changed, interpreted, interpreted_strictly, without_sorts
from triton_cases import assert_close, exact

from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.mosaic_tpu import CHIPS
from pallas_kernels.sparse_attention import backward_mosaic_tpu, mosaic_tpu
from pallas_kernels.sparse_attention.backward_mosaic_tpu import BackwardConfig
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig
from pallas_kernels.sparse_attention.mosaic_tpu import SparseAttentionConfig, sparse_attention
from pallas_kernels.sparse_attention.reverse_tiles import reverse_tiles

# Several steps of several parts, and little to compile.
FORWARD = TileConfig(queries=8, blocks_per_step=2, blocks_per_part=2)
FEW = BackwardConfig(blocks_per_step=2, blocks_per_part=1, tiles_per_step=2, tiles_per_part=1)


def gradients(case, block_ids, do, dlse, config=FEW):
    """Of sum(o * do) + sum(lse * dlse), in q, k and v."""
    place = jnp.asarray(block_ids), *case.place().values()
    sizes = {"block_size": case.block_size, "scale": case.head_dim**-0.5}
    sizes["config"] = SparseAttentionConfig(FORWARD, config)

    @compiled
    def run(q, k, v, do, dlse):
        def attend(q, k, v):
            return sparse_attention(q, k, v, *place, **sizes)

        return jax.vjp(attend, q, k, v)[1]((do, dlse))

    return run(*case.main_inputs(), do, dlse)


def assert_as_oracle(case, block_ids, config=FEW):
    inputs = exact(*case.main_inputs())
    mask = case.mask(block_ids)
    do = jnp.asarray(case.normal(6, *inputs[0].shape[1:]), case.dtype)
    dlse = jnp.asarray(case.normal(7, inputs[0].shape[2], inputs[0].shape[1]), jnp.float32)
    actual = gradients(case, block_ids, do, dlse, config)
    # The oracle has gradients of visible rows only.
    seen = np.isfinite(numpy_oracle.attention(*inputs, mask)[1])
    dlse = np.where(seen, dlse, 0)
    wanted = numpy_oracle.attention_gradients(*inputs, mask, *exact(do), dlse)
    for array, gradient in zip(actual, wanted, strict=True):
        assert array.dtype == case.dtype
        assert_close(array, gradient, case.dtype)
    assert not np.asarray(actual[0])[~seen.swapaxes(1, 2)].any()
    return actual


STRICT = "bfloat16", "documents with padding behind them"


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICT])
def test_gradients(name):
    with interpreted():
        assert_as_oracle(CASES[name], CASES[name].block_ids())


@pytest.mark.parametrize("name", STRICT)
def test_gradients_without_races_and_in_memory_of_nan(name):
    with interpreted_strictly():
        assert_as_oracle(CASES[name], CASES[name].block_ids())


def test_tile_sizes_as_they_are_by_default():
    case = changed(per_group=16, dtype="bfloat16")
    with interpreted():
        assert_as_oracle(case, case.block_ids(), BackwardConfig())


def test_lists_of_several_slices_and_of_none():
    """Everybody picks block 0, nobody block 1; slices of three tiles, of which a step holds two."""
    case = changed(num_queries=150, query_offset=0)
    block_ids = np.full((1, 1, 150, 2), -1, np.int32)
    block_ids[..., 0] = 0
    block_ids[:, :, ::3, 1] = 2
    config = dataclasses.replace(FEW, tiles_per_slice=3)
    with interpreted():
        _, dk, dv = assert_as_oracle(case, block_ids, config)
    assert not np.asarray(dk)[:, 64:128].any()
    assert not np.asarray(dv)[:, 64:128].any()


def test_two_cores_and_one_block():
    """The second core has nothing to sum."""
    case = changed(num_queries=40, num_keys=40, query_offset=0)
    with interpreted():
        assert_as_oracle(case, np.zeros((1, 1, 40, 1), np.int32))


def test_slices_are_longer_where_scalar_memory_would_overflow(monkeypatch):
    case = changed(num_queries=70, num_keys=70, query_offset=0)
    monkeypatch.setattr(backward_mosaic_tpu, "_OWNER_BYTES", 64)
    cut = []
    monkeypatch.setattr(
        backward_mosaic_tpu,
        "reverse_tiles",
        lambda *args, **sizes: cut.append(reverse_tiles(*args, **sizes)) or cut[-1],
    )
    with interpreted():
        assert_as_oracle(case, case.block_ids(), dataclasses.replace(FEW, tiles_per_slice=1))
    assert cut[0].owners.shape[0] * 4 <= 64


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"queries": 12}, "queries=12"),
        ({"blocks_per_part": 3}, "blocks_per_step=16: must be a multiple of blocks_per_part=3"),
        ({"tiles_per_part": 3}, "tiles_per_step=16: must be a multiple of tiles_per_part=3"),
        ({"tiles_per_slice": 0}, "tiles_per_slice=0"),
    ],
)
def test_config_says_what_is_wrong(sizes, message):
    with pytest.raises(ValueError, match=message):
        BackwardConfig(**sizes)


def gradients_of_sums(q, k, v, block_ids):
    def loss(q, k, v):
        o, lse = sparse_attention(q, k, v, block_ids, None, 0, block_size=128, scale=0.1)
        return o.astype(jnp.float32).sum() + lse.sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def inputs(num_tokens):
    q = jax.ShapeDtypeStruct((1, num_tokens, 64, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, num_tokens, 4, 128), "bfloat16")
    return q, k, k, jax.ShapeDtypeStruct((1, 4, num_tokens, 16), "int32")


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, monkeypatch):
    """One of them at 32K tokens, to see that memory does not grow with the square of the length."""
    without_sorts(monkeypatch, backward_mosaic_tpu, mosaic_tpu)
    num_tokens = 32768 if chip == "v5p" else 4096
    program = compile_for_tpu(gradients_of_sums, *inputs(num_tokens), chip=chip)
    text = program.as_text()
    assert "sparse_attention_query_gradient" in text
    assert "sparse_attention_key_value_gradient" in text
    assert program.memory_analysis().temp_size_in_bytes < 4e9
