"""How good a selection is, measured against dense main-branch attention."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msa_jax.attention.mixer import Mode
from msa_jax.config import AttentionConfig
from msa_jax.sharding import constrain
from pallas_kernels import BlockSelection, main_block_mass
from pallas_kernels.visibility import query_slots, segments_at

# How far apart the neighbours are whose selections are compared.
OVERLAP_DISTANCES = (1, 4, 16, 64)
# Below this share of a query's attention the free blocks are as good as none.
COLLAPSED_MASS = 0.01

SELECTION_METRICS = (
    "score_recall",
    "block_recall",
    "coverage",
    "selected_mass",
    "collapsed",
    "union_4",
    "union_8",
    "selection_entropy",
    *(f"overlap_{distance}" for distance in OVERLAP_DISTANCES),
)


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
    """The `SELECTION_METRICS`, means over groups and over the queries that had a choice.

    A query has a choice when it sees more than K blocks; the others attend densely and would only
    flatter the means. Without any, every metric is 0.

    * `score_recall`: attention mass of the best K blocks that were also selected, as a share of the
      best K blocks' mass. Best K: by the group's mean attention.
    * `block_recall`: share of the best K blocks that were selected.
    * `coverage`: mass of the selected free blocks as a share of all mass outside the query's own
      block. Near 0 means that nothing is found beyond it.
    * `selected_mass`: mass of all selected blocks.
    * `collapsed`: share of queries whose free blocks hold less than 1 % of the attention mass.
    * `union_4`, `union_8`: distinct blocks among 4 and 8 neighbouring queries (K: all the same).
    * `selection_entropy`: of the selected free blocks' ids within a sequence, nats; near 0 means
      that every query picks the same blocks.
    * `overlap_1`, `overlap_4`, `overlap_16`, `overlap_64`: share of a query's free blocks that are
      also free blocks of the query so many tokens later in its document.
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
    overlaps = _overlaps(free, chose, _documents(segment_ids, q, query_offset))
    return {
        "score_recall": share(best & selected, best),
        "block_recall": mean((best & selected).sum(-1) / jnp.maximum(best.sum(-1), 1)),
        "coverage": share(free, ~own),
        "selected_mass": mean((mass * selected).sum(-1)),
        "collapsed": mean((mass * free).sum(-1) < COLLAPSED_MASS),
        "union_4": _union(selected, chose, 4),
        "union_8": _union(selected, chose, 8),
        "selection_entropy": entropy.mean(),
        **overlaps,
    }


def selection_overlap(
    block_ids: Int[Array, "*batch T K"], other_ids: Int[Array, "*batch T K"]
) -> Float[Array, ""]:
    """How much of one selection another one shares, such as that of an earlier checkpoint.

    Args:
      block_ids: the selection of rows of one document each; valid ids ascend, -1 is none.
      other_ids: another selection of the same queries.

    Returns:
      The mean share of a query's free blocks, those besides its own, that the other selection
      holds too, over the queries that see more than K blocks. Without any, 0.
    """
    own = block_ids.max(-1, keepdims=True)
    free = (block_ids >= 0) & (block_ids != own)
    shared = free & (block_ids[..., :, None] == other_ids[..., None, :]).any(-1)
    chose = own[..., 0] >= block_ids.shape[-1]
    shares = shared.sum(-1) / jnp.maximum(free.sum(-1), 1)
    return (shares * chose).sum() / jnp.maximum(chose.sum(), 1)


def _documents(
    segment_ids: Int[Array, "B S"] | None, q: Array, query_offset: int | Int[Array, "B"]
) -> Int[Array, "B T"] | None:
    """The document of each query, None if there is only one."""
    if segment_ids is None or segment_ids.shape[1] == q.shape[1]:
        return segment_ids  # queries sit in all slots
    return segments_at(segment_ids, query_slots(q.shape[0], q.shape[1], query_offset))


def _overlaps(
    free: Bool[Array, "B Hkv T N"],
    chose: Bool[Array, "B Hkv T"],
    documents: Int[Array, "B T"] | None,
) -> dict[str, Float[Array, ""]]:
    """Agreement of neighbours in a document, by distance; 0 without any."""
    free = constrain(free, "batch", "heads", None, None)
    chose = constrain(chose, "batch", "heads", None)
    documents = None if documents is None else constrain(documents, "batch", None)
    found = {}
    for distance in OVERLAP_DISTANCES:
        early, late = free[:, :, :-distance], free[:, :, distance:]
        counted = chose[:, :, :-distance] & chose[:, :, distance:]
        if documents is not None:
            counted &= (documents[:, :-distance] == documents[:, distance:])[:, None]
        shares = (early & late).sum(-1) / jnp.maximum(early.sum(-1), 1)
        mean = (shares * counted).sum() / jnp.maximum(counted.sum(), 1)
        found[f"overlap_{distance}"] = mean
    return found


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
