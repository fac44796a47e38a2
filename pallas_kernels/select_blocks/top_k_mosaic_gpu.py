"""Exact top-k on Hopper: each lane keeps the best candidates of its own queries in registers.

A thread block is one warpgroup on a tile of neighbouring queries. Candidates come in ascending id
order, one vector over the queries at a time, and are inserted where they are strictly better, so
that of equal scores the lower id is kept. Nothing is exchanged between lanes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import current_target

WARPGROUP = 128
# Two registers per list entry and query: more would not fit beside the candidates.
MAX_TOP_K = 64


@dataclasses.dataclass(frozen=True)
class TopKConfig:
    """Tile sizes of the top-k kernel.

    Attributes:
      queries_per_lane: 1 or 2.
      unroll: candidates whose loads are in flight together; fewer for long lists, whose insertion
        takes long enough.
    """

    queries_per_lane: int = 1
    unroll: int = 8

    def __post_init__(self):
        if self.queries_per_lane not in (1, 2):
            raise ValueError(
                f"queries_per_lane={self.queries_per_lane}: choose 1 or 2, every query takes "
                "two registers per selected block"
            )
        if self.unroll < 1:
            raise ValueError(f"unroll={self.unroll}: must be >= 1")

    def unroll_for(self, top_k: int) -> int:
        """Bounded, since the code of all insertions is unrolled with the loads."""
        return max(1, min(self.unroll, 128 // top_k))

    @property
    def tile(self) -> int:
        """Queries per thread block."""
        return WARPGROUP * self.queries_per_lane


def top_ids(
    scores: Float[Array, "B Hkv N C"],
    own_ids: Int[Array, "B C"] | None,
    first_ids: Int[Array, "B tiles"],
    end_ids: Int[Array, "B tiles"],
    parents: Int[Array, "B Hkv P C"] | None = None,
    *,
    top_k: int,
    config: TopKConfig,
) -> Int[Array, "B Hkv K C"]:
    """The K best candidates per query by score descending, then lower id; ids ascending, then -1.

    Candidates of score -inf are never chosen; there must be no NaN.

    Args:
      scores: candidate n of every query; its id is n, or with `parents` the n-th child's.
      own_ids: an id that is chosen whatever its score and must not be a candidate of a score above
        -inf; -1 chooses none. None where there is no such id.
      first_ids: the first candidate of each tile of queries.
      end_ids: the end of its candidates; at least `first_ids`, at most N.
      parents: ascending ids, then -1, of N / P consecutive candidates each: candidate n's id is
        parents[n // (N / P)] * (N / P) + n % (N / P). Those of parent -1 must score -inf.
      top_k: K, at most `MAX_TOP_K`.
      config: tile sizes; C is a multiple of the tile.
    """
    batch, num_heads, num_candidates, num_queries = scores.shape
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k={top_k}: registers hold at most {MAX_TOP_K} blocks per query")
    body = functools.partial(
        _select_tile,
        children=None if parents is None else num_candidates // parents.shape[2],
        has_own=own_ids is not None,
        top_k=top_k,
        config=config,
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, num_heads, top_k, num_queries), jnp.int32),
        grid=(num_queries // config.tile, batch, num_heads),
        grid_names=("tile", "row", "head"),
        num_threads=1,
        thread_name="warpgroup",
        interpret=current_target().interpret,
        kernel_name="top_ids",
    )(
        scores,
        first_ids,
        end_ids,
        *(() if own_ids is None else (own_ids,)),
        *(() if parents is None else (parents,)),
    )


def _select_tile(scores_ref, first_ref, end_ref, *rest, children, has_own, top_k, config):
    """One thread block: the stream of candidates through the lists."""
    *optional, ids_ref = rest
    own_ref = optional[0] if has_own else None
    parents_ref = None if children is None else optional[-1]
    tile, row, head = (lax.axis_index(name) for name in ("tile", "row", "head"))
    tile = lax.axis_size("tile") - 1 - tile  # late tiles have the most candidates
    columns = pl.ds(pl.multiple_of(tile * config.tile, config.tile), config.tile)
    first, end = first_ref[row, tile], end_ref[row, tile]

    def load(ref, *index):
        layout = plgpu.Layout.WG_STRIDED((config.tile,), vec_size=config.queries_per_lane)
        return plgpu.load(ref.at[(*index, columns)], layout=layout)

    unroll, last = config.unroll_for(top_k), scores_ref.shape[2] - 1

    def insert_all(base, chosen):
        indices = [base + i for i in range(unroll)]
        loaded = [load(scores_ref, row, head, jnp.minimum(index, last)) for index in indices]
        for index, score in zip(indices, loaded, strict=True):
            score = jnp.minimum(score, jnp.where(index < end, jnp.inf, -jnp.inf))
            if parents_ref is None:
                ids = jnp.full((config.tile,), index, jnp.int32)
            else:
                parent = load(parents_ref, row, head, lax.div(jnp.minimum(index, last), children))
                ids = parent * children + lax.rem(index, children)
            chosen = _insert(score, ids, chosen)
        return chosen

    own = None if own_ref is None else load(own_ref, row)
    chosen = _empty_lists(top_k, config.tile, own)
    num_steps = lax.div(end - first + unroll - 1, unroll)
    chosen = lax.fori_loop(
        0, num_steps, lambda i, chosen: insert_all(first + i * unroll, chosen), chosen
    )
    for i, ids in enumerate(_ascending([ids for _, ids in chosen])):
        ids_ref[row, head, i, columns] = ids


def _empty_lists(top_k: int, size: int, own: jax.Array | None):
    """The K best so far, best first: none, or the own id above every score."""
    nothing = (jnp.full((size,), -jnp.inf, jnp.float32), jnp.full((size,), -1, jnp.int32))
    lists = [nothing] * top_k
    if own is not None:
        lists[0] = (jnp.where(own >= 0, jnp.inf, -jnp.inf).astype(jnp.float32), own)
    return tuple(lists)


def _insert(score, ids, chosen):
    """Puts one candidate per query into its list, behind entries of the same score."""
    result = []
    above = None  # the entry above, before the insertion
    for kept_score, kept_ids in chosen:
        better = score > kept_score
        if above is None:
            new_score, new_ids = score, ids
        else:
            was_better, above_score, above_ids = above
            new_score = jnp.where(was_better, above_score, score)
            new_ids = jnp.where(was_better, above_ids, ids)
        result.append(
            (jnp.where(better, new_score, kept_score), jnp.where(better, new_ids, kept_ids))
        )
        above = (better, kept_score, kept_ids)
    return tuple(result)


def _ascending(ids: list[jax.Array]) -> list[jax.Array]:
    """Sorts the K ids of every query by a network of exchanges, -1 last."""
    absent = jnp.iinfo(jnp.int32).max
    ids = [jnp.where(x < 0, absent, x) for x in ids]
    for low, high in _exchanges(len(ids)):
        ids[low], ids[high] = jnp.minimum(ids[low], ids[high]), jnp.maximum(ids[low], ids[high])
    return [jnp.where(x == absent, -1, x) for x in ids]


def _exchanges(count: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort of `count` values, as pairs to bring into order."""
    pairs = []
    half = 1 << max(0, (count - 1).bit_length() - 1)
    span = half
    while span > 0:
        step, remainder, distance = half, 0, span
        while True:
            pairs += [(i, i + distance) for i in range(count - distance) if i & span == remainder]
            if step == span:
                break
            distance, step, remainder = step - span, step // 2, span
        span //= 2
    return pairs
