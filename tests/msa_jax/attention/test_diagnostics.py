"""Selection metrics against their definitions, one query at a time in numpy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.attention import Mode, MSAttention
from msa_jax.attention.diagnostics import (
    OVERLAP_DISTANCES,
    SELECTION_METRICS,
    selection_metrics,
    selection_overlap,
)
from msa_jax.config import AttentionConfig
from pallas_kernels import BlockSelection

BATCH, LENGTH, BLOCK_SIZE, TOP_K = 2, 40, 4, 3
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
CONFIG = AttentionConfig(
    num_heads=HEADS,
    num_kv_heads=GROUPS,
    head_dim=HEAD_DIM,
    rope_dim=4,
    block_size=BLOCK_SIZE,
    top_k=TOP_K,
    index_dim=4,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
metrics_of = jax.jit(selection_metrics, static_argnames="config")
NO_OFFSET = np.zeros(BATCH, np.int32)


def segments():
    """Row 0: documents of 22 and 14 tokens, padding between and behind. Row 1: one of 33."""
    segment_ids = np.zeros((BATCH, LENGTH), np.int32)
    segment_ids[0, :22], segment_ids[0, 24:38] = 1, 2
    segment_ids[1, :33] = 1
    return segment_ids


def heads():
    rng = np.random.default_rng(0)
    q = 2 * rng.normal(size=(BATCH, LENGTH, HEADS, HEAD_DIM))
    return q.astype(np.float32), rng.normal(size=(BATCH, LENGTH, GROUPS, HEAD_DIM)).astype("f4")


def some_blocks(segment_ids, seed=3):
    """The query's own block and two arbitrary ones before it in its document."""
    rng = np.random.default_rng(seed)
    block_ids = np.full((BATCH, GROUPS, LENGTH, TOP_K), -1, np.int32)
    for b, r, t in np.ndindex(BATCH, GROUPS, LENGTH):
        if segment_ids[b, t] == 0:
            continue
        first = int(np.argmax(segment_ids[b] == segment_ids[b, t])) // BLOCK_SIZE
        past = np.arange(first, t // BLOCK_SIZE)
        free = rng.choice(past, min(TOP_K - 1, len(past)), replace=False)
        ids = sorted([*free.tolist(), t // BLOCK_SIZE])
        block_ids[b, r, t, : len(ids)] = ids
    return block_ids


def block_masses(q, k, segment_ids, b, r, t, slot):
    """Dense attention mass of each visible block, the mean over the group's heads."""
    seen = np.arange(slot + 1)
    seen = seen[segment_ids[b, seen] == segment_ids[b, slot]]
    masses = {}
    per_group = HEADS // GROUPS
    for h in range(r * per_group, (r + 1) * per_group):
        scores = k[b, seen, r].astype(float) @ q[b, t, h] * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max())
        for token, weight in zip(seen, weights / weights.sum(), strict=True):
            block = int(token) // BLOCK_SIZE
            masses[block] = masses.get(block, 0) + weight / per_group
    return masses


def brute_force(q, k, block_ids, segment_ids, offset=0):
    """Every metric by its definition."""
    names = ("score_recall", "block_recall", "coverage", "selected_mass", "collapsed")
    values = {name: [] for name in names}
    overlaps = {distance: [] for distance in OVERLAP_DISTANCES}
    unions, entropies = {4: [], 8: []}, []
    for b, r in np.ndindex(BATCH, GROUPS):
        chosen, free_of, free_ids = {}, {}, []
        for t in range(q.shape[1]):
            slot = t + offset
            if segment_ids[b, slot] == 0:
                continue
            masses = block_masses(q, k, segment_ids, b, r, t, slot)
            if len(masses) <= TOP_K:
                continue
            best = sorted(masses, key=masses.__getitem__, reverse=True)[:TOP_K]
            picked = [n for n in block_ids[b, r, t].tolist() if n >= 0]
            own = slot // BLOCK_SIZE
            free = [n for n in picked if n != own]
            both = set(best) & set(picked)
            values["score_recall"].append(
                sum(masses[n] for n in both) / sum(masses[n] for n in best)
            )
            values["block_recall"].append(len(both) / TOP_K)
            values["coverage"].append(sum(masses[n] for n in free) / (1 - masses[own]))
            values["selected_mass"].append(sum(masses[n] for n in picked))
            values["collapsed"].append(sum(masses[n] for n in free) < 0.01)
            chosen[t] = picked
            free_of[t] = set(free)
            free_ids += free
        for size, sizes in unions.items():
            for start in range(0, q.shape[1] - size + 1, size):
                run = range(start, start + size)
                if all(t in chosen for t in run):
                    sizes.append(len(set().union(*(chosen[t] for t in run))))
        for distance, t in itertools.product(overlaps, free_of):
            later = t + distance
            if later in free_of and segment_ids[b, t + offset] == segment_ids[b, later + offset]:
                shared = free_of[t] & free_of[later]
                overlaps[distance].append(len(shared) / len(free_of[t]))
        shares = np.unique(free_ids, return_counts=True)[1] / max(len(free_ids), 1)
        entropies.append(-(shares * np.log(shares)).sum())
    means = {name: np.mean(v) for name, v in values.items()}
    means |= {f"overlap_{n}": np.mean(v) if v else 0.0 for n, v in overlaps.items()}
    means |= {f"union_{size}": np.mean(sizes) for size, sizes in unions.items()}
    return means | {"selection_entropy": np.mean(entropies)}


@pytest.mark.fast
def test_metrics_are_their_definitions_in_packed_rows():
    (q, k), segment_ids = heads(), segments()
    block_ids = some_blocks(segment_ids)
    selection = BlockSelection(jnp.asarray(block_ids), BLOCK_SIZE)
    metrics = metrics_of(q, k, selection, CONFIG, segment_ids=segment_ids, query_offset=NO_OFFSET)
    expected = brute_force(q, k, block_ids, segment_ids)
    assert metrics.keys() == expected.keys() == set(SELECTION_METRICS)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    for name in ("score_recall", "block_recall", "coverage", "selected_mass"):
        assert 0.05 < metrics[name] < 0.95, name
    assert TOP_K < metrics["union_4"] < metrics["union_8"] < 8 * TOP_K
    assert 0 < metrics["selection_entropy"] < np.log(LENGTH / BLOCK_SIZE)


def test_metrics_of_cached_decoding_look_at_the_queries_slots():
    q, k = heads()
    ones = np.ones((BATCH, LENGTH), np.int32)
    block_ids = some_blocks(ones)
    start, stop = 24, 40
    selection = BlockSelection(jnp.asarray(block_ids[:, :, start:stop]), BLOCK_SIZE)
    offsets = np.full(BATCH, start, np.int32)
    metrics = metrics_of(
        q[:, start:stop], k, selection, CONFIG, segment_ids=None, query_offset=offsets
    )
    expected = brute_force(q[:, start:stop], k, block_ids[:, :, start:stop], ones, start)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_without_a_choice_every_metric_is_zero():
    (q, k), segment_ids = heads(), np.ones((BATCH, LENGTH), np.int32)
    segment_ids[:, 12:] = 0  # three blocks
    selection = BlockSelection(jnp.asarray(some_blocks(segment_ids)), BLOCK_SIZE)
    metrics = metrics_of(q, k, selection, CONFIG, segment_ids=segment_ids, query_offset=NO_OFFSET)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)


def layer_metrics(filled, selector, x):
    """Of a layer whose queries look like its keys, so that each likes its own block best."""
    sinks = 1 if selector == "sink_window" else 0
    config = dataclasses.replace(CONFIG, num_heads=GROUPS, selector=selector, num_sink_blocks=sinks)
    layer = filled(lambda rngs: MSAttention(config, 12, rngs=rngs))
    layer.main.q = layer.main.k
    gain = np.full(HEAD_DIM, 5, np.float32)
    layer.main.q_norm.weight.set_value(gain)
    layer.main.k_norm.weight.set_value(np.zeros_like(gain))
    return jax.jit(lambda layer, x: layer(x, mode=Mode(diagnostics=True)).aux)(layer, x)


def test_the_oracle_is_perfect_and_the_others_are_not(filled):
    """Where every query's own block, always kept, is among the best."""
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, 12)).astype(np.float32)
    oracle = layer_metrics(filled, "oracle", x)
    np.testing.assert_allclose(oracle["block_recall"], 1, rtol=1e-6)
    np.testing.assert_allclose(oracle["score_recall"], 1, rtol=1e-6)
    assert 0.2 < oracle["coverage"] < 1
    window = layer_metrics(filled, "sink_window", x)
    for name in ("block_recall", "score_recall", "coverage", "selected_mass"):
        assert window[name] < oracle[name] - 0.01, name


def test_collapse_is_of_queries_whose_free_blocks_hold_nothing():
    """Keys of one block draw all attention; half of the queries keep it, the others do not."""
    q = np.ones((1, LENGTH, HEADS, HEAD_DIM), np.float32)
    k = np.zeros((1, LENGTH, GROUPS, HEAD_DIM), np.float32)
    k[:, :BLOCK_SIZE] = 9.0
    block_ids = np.tile([1, 2, 0], (1, GROUPS, LENGTH, 1)).astype(np.int32)
    block_ids[..., 2] = np.arange(LENGTH) // BLOCK_SIZE
    block_ids[:, :, ::2, :2] = [0, 1]
    selection = BlockSelection(jnp.asarray(block_ids), BLOCK_SIZE)
    metrics = metrics_of(q, k, selection, CONFIG, segment_ids=None, query_offset=NO_OFFSET[:1])
    assert metrics["collapsed"] == 0.5
    assert metrics["overlap_1"] == 0.5
    assert metrics["overlap_4"] == metrics["overlap_16"] == 1
    assert metrics["overlap_64"] == 0


def test_overlap_with_another_selection_is_of_free_blocks_with_a_choice():
    def ids(*rows):
        return jnp.asarray(rows, jnp.int32)

    # Two of three blocks kept by force of there being no more, then queries in blocks 3, 4 and 5.
    mine = ids([0, 1, -1], [0, 1, 3], [1, 2, 4], [0, 2, 5])
    other = ids([0, 1, -1], [1, 2, 3], [1, 2, 4], [1, 3, 5])
    assert jax.jit(selection_overlap)(mine, mine) == 1
    np.testing.assert_allclose(selection_overlap(mine, other), (0.5 + 1 + 0) / 3)
    assert selection_overlap(mine[:1], other[:1]) == 0
