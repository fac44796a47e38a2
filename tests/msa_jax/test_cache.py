"""The KV cache: every row writes at its own length, and refuses what it has no place for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.cache import KVCache


def tokens(count, seed):
    rng = np.random.default_rng(seed)
    heads = jnp.asarray(rng.normal(size=(2, 2, count, 3, 4)), jnp.float32)
    return heads[0], heads[1], jnp.asarray(rng.normal(size=(2, count, 5)), jnp.float32)


def test_rows_of_different_lengths_append_behind_their_own_tokens():
    cache = KVCache.empty(2, 9, 3, 4, index_dim=5, dtype="float32")
    assert cache.length.tolist() == [0, 0]
    prompt, new = tokens(4, seed=0), tokens(2, seed=1)
    cache = cache.append(*prompt)
    # Row 1 held 3 tokens and one of padding, which the next tokens replace.
    cache = KVCache(cache.k, cache.v, cache.index_k, jnp.array([4, 3], jnp.int32))
    cache = jax.jit(KVCache.append)(cache, *new)
    assert cache.length.tolist() == [6, 5]
    for slots, old, added in zip((cache.k, cache.v, cache.index_k), prompt, new, strict=True):
        assert slots.shape[:2] == (2, 9)
        np.testing.assert_array_equal(slots[0, :6], jnp.concatenate([old[0], added[0]]))
        np.testing.assert_array_equal(slots[1, :5], jnp.concatenate([old[1, :3], added[1]]))
        assert not slots[0, 6:].any()


def test_values_are_kept_in_the_caches_dtype():
    cache = KVCache.empty(2, 4, 3, 4, index_dim=None, dtype="bfloat16")
    k, v, _ = tokens(1, seed=0)
    cache = cache.append(k, v, None)
    assert (cache.k.dtype, cache.v.dtype, cache.index_k) == (jnp.bfloat16, jnp.bfloat16, None)
    np.testing.assert_array_equal(cache.k[:, :1], k.astype(jnp.bfloat16))


@pytest.mark.parametrize("has_place", [True, False])
def test_a_cache_of_another_mixer_is_an_error(has_place):
    """Index keys would be lost, or old ones kept, without a word."""
    cache = KVCache.empty(2, 4, 3, 4, index_dim=5 if has_place else None, dtype="float32")
    k, v, index_k = tokens(1, seed=0)
    with pytest.raises(ValueError, match="make it with this mixer's init_cache"):
        cache.append(k, v, None if has_place else index_k)
