"""How good a selection is, measured against dense main-branch attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msa_jax.attention.mixer import Mode
from msa_jax.config import AttentionConfig
from msa_jax.sharding import constrain
from pallas_kernels import BlockSelection, main_block_mass


def selection_reports(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    selection: BlockSelection,
    config: AttentionConfig,
    mode: Mode,
    *,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: int | Int[Array, "B"],
) -> dict[str, Array]:
    """What `mode` asks a layer to say of its selection: its metrics, its block ids."""
    place = {"segment_ids": segment_ids, "query_offset": query_offset}
    reports = selection_metrics(q, k, selection, config, **place) if mode.diagnostics else {}
    return reports | ({"block_ids": selection.block_ids} if mode.selections else {})


def selection_metrics(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    selection: BlockSelection,
    config: AttentionConfig,
    *,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: int | Int[Array, "B"],
) -> dict[str, Float[Array, ""]]:
    """Selection metrics, means over groups and over the queries that had a choice.

    A query has a choice when it sees more than K blocks; the others attend densely and would only
    flatter the means. Without any, every metric is 0.

    * `score_recall`: attention mass of the best K blocks that were also selected, as a share of the
      best K blocks' mass. Best K: by the group's mean attention.
    * `block_recall`: share of the best K blocks that were selected.
    * `coverage`: mass of the selected free blocks as a share of all mass outside the query's own
      block. Near 0 means that nothing is found beyond it.
    * `selected_mass`: mass of all selected blocks.
    * `union_4`, `union_8`: distinct blocks among 4 and 8 neighbouring queries (K: all the same).
    * `selection_entropy`: of the selected free blocks' ids within a sequence, nats; near 0 means
      that every query picks the same blocks.
    """
    mass = main_block_mass(
        q,
        k,
        block_size=selection.block_size,
        segment_ids=segment_ids,
        query_offset=query_offset,
    )
    num_blocks, top_k = mass.shape[-1], config.top_k
    visible = (mass > 0).sum(-1)
    chose = visible > top_k
    selected = selection.block_mask(num_blocks)
    own = jnp.arange(num_blocks) == selection.block_ids.max(-1)[..., None]
    threshold = jnp.sort(mass, axis=-1)[..., -min(top_k, num_blocks)][..., None]
    best = (mass >= threshold) & (mass > 0)
    free = selected & ~own

    def mean(values):
        return (values * chose).sum() / jnp.maximum(chose.sum(), 1)

    def share(part, whole):
        return mean((mass * part).sum(-1) / jnp.maximum((mass * whole).sum(-1), 1e-9))

    frequency = (free & chose[..., None]).sum(-2) / jnp.maximum(
        (free & chose[..., None]).sum((-2, -1), keepdims=True)[..., 0], 1
    )
    entropy = -(frequency * jnp.log(jnp.maximum(frequency, 1e-30))).sum(-1)
    return {
        "score_recall": share(best & selected, best),
        "block_recall": mean((best & selected).sum(-1) / jnp.maximum(best.sum(-1), 1)),
        "coverage": share(free, ~own),
        "selected_mass": mean((mass * selected).sum(-1)),
        "union_4": _union(selected, chose, 4),
        "union_8": _union(selected, chose, 8),
        "selection_entropy": entropy.mean(),
    }


def _union(selected: Array, chose: Array, neighbours: int) -> Float[Array, ""]:
    """Mean number of distinct blocks over aligned runs of queries that all had a choice."""
    selected = constrain(selected, "batch", "heads", None, None)
    chose = constrain(chose, "batch", "heads", None)
    runs = selected.shape[2] // neighbours
    if runs == 0:
        return jnp.zeros(())
    shape = (*selected.shape[:2], runs, neighbours)
    sizes = selected[:, :, : runs * neighbours].reshape(*shape, -1).any(3).sum(-1)
    counted = chose[:, :, : runs * neighbours].reshape(shape).all(-1)
    return (sizes * counted).sum() / jnp.maximum(counted.sum(), 1)
