"""How often the loops of each kernel run whose number of trips is decided by the data.

`KERNELS` has an entry per kernel: a function of the shape, the chip's name and the schedule. Paths
of sections are as `python -m experiments.compile_check` prints them. All but the selection's hold
for a schedule of a shorter sequence, too: what depends on the length is counted from the shape.
"""

import math
from collections.abc import Callable

from experiments.compiling.bundles import Section
from experiments.compiling.configs import config_of
from experiments.compiling.hlo import plain_name
from experiments.compiling.programs import Shape
from experiments.compiling.timing import Expected
from pallas_kernels.mosaic_tpu import CHIPS, LANES
from pallas_kernels.sparse_attention.query_gradient_mosaic_tpu import NUM_STATISTICS

Entry = Callable[[Shape, str, Section], Expected]
Counts = dict[str, float]

_HALF, _WORD = 2, 4  # bytes of a bfloat16 and of a float32
# Of the megabyte of scalar memory, what the owners of slices may take (see `backward_mosaic_tpu`).
_OWNER_BYTES = 2**19


def distinct_blocks(shape: Shape, queries: int) -> float:
    """Blocks that neighbouring queries of one group select together.

    U(R) = 16 + 2.03 (R - 1), from the overlap reported of a trained model (`docs/kernels.md`), and
    no more than a causal query has before it on the average.

    Args:
      shape: of the selection.
      queries: R.
    """
    overlap = shape.top_k * (1 + 2.03 / 16 * (queries - 1))
    return min(overlap, shape.length / shape.block_size / 2)


def slices_per_owner(tiles: float, length: float) -> float:
    """Slices of at most `length` tiles that a key block's tiles are cut into, in the mean.

    Where causal queries pick blocks evenly, the block that lies at a share u of the sequence is
    picked by -ln(u) times as many tiles as the mean one; this is the mean of that number's slices,
    rounded up.

    Args:
      tiles: that need the mean block.
      length: tiles of a slice.
    """
    return 1 / (1 - math.exp(-length / tiles))


def slice_length(shape: Shape, chip: str) -> int:
    """Tiles per slice in the gradients of keys and values: more, where owners would not fit."""
    config = config_of("sparse_attention_gradient", shape, chip)
    cores = CHIPS[chip].num_cores
    rows = shape.batch * shape.num_kv_heads
    tiles = -(-shape.num_queries // (config.queries * cores)) * cores
    pages = rows * -(-shape.length // shape.block_size)
    entries = rows * tiles * min(config.queries * shape.top_k, pages // rows)
    length = config.tiles_per_slice
    while _WORD * (entries // length + pages) > _OWNER_BYTES and length < entries:
        length *= 2
    return length


def _selection(shape: Shape, chip: str, schedule: Section) -> Expected:
    """Lm0: tiles of rows; Lm0.Lm0: chunks of keys; Lm0.L0 and Lm0.L1.L0: groups of 8 blocks."""
    unroll = config_of("select_blocks", shape, chip).unroll
    (products,) = (section for section in schedule.walk() if section.path == "Lm0.Lm0")
    key_bytes = _HALF * shape.index_dim
    chunk = products.copied_bytes // key_bytes
    tiles = _grid(schedule) * CHIPS[chip].num_cores
    queries = shape.num_queries * shape.batch // tiles
    # Own block of a tile's last query: what is before it is scored.
    offset = shape.length - shape.num_queries + queries - 1
    starts = (offset + tile * queries % shape.num_queries for tile in range(tiles))
    own = [slot // shape.block_size for slot in starts]
    chunks = sum(-(-block * shape.block_size // chunk) for block in own) / tiles
    groups = sum(-(-(block // 8 + 1) // unroll) for block in own) / tiles
    counts = {"Lm0": _grid(schedule), "Lm0.Lm0": chunks, "Lm0.L0": groups, "Lm0.L1.L0": groups}
    keys = (chunks * chunk + shape.num_kv_heads * queries) * key_bytes
    return Expected(counts, tiles * keys)


def _forward(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("sparse_attention", shape, chip)
    rows = config.queries * _group(shape)
    around = 2 * rows * shape.head_dim * _HALF
    pair = 4 * rows * shape.head_dim
    return _over_blocks(shape, chip, schedule, config, 2 * shape.head_dim, around, pair)


def _query_gradient(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("sparse_attention_gradient", shape, chip)
    rows = config.queries * _group(shape)
    around = 3 * rows * shape.head_dim * _HALF + NUM_STATISTICS * _lanes(rows) * _WORD
    pair = 6 * rows * shape.head_dim
    return _over_blocks(shape, chip, schedule, config.tiles, 2 * shape.head_dim, around, pair)


def _divergence(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("index_kl", shape, chip)
    pair = config.queries * 2 * (_group(shape) * shape.head_dim + shape.index_dim)
    around = _alignment_tile(shape, config.queries) + config.queries * LANES * _WORD
    width = shape.head_dim + shape.index_dim
    return _over_blocks(shape, chip, schedule, config, width, around, pair)


def _index_q_gradient(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("index_kl", shape, chip)
    pair = config.queries * 2 * (_group(shape) * shape.head_dim + 2 * shape.index_dim)
    around = _alignment_tile(shape, config.queries) + config.queries * shape.index_dim * _WORD
    width = shape.head_dim + shape.index_dim
    return _over_blocks(shape, chip, schedule, config, width, around, pair)


def _over_blocks(
    shape: Shape, chip: str, schedule: Section, config, width: int, around: int, pair: int
) -> Expected:
    """Of a kernel whose grid is tiles of queries that go through their distinct blocks.

    Args:
      shape: of the call.
      chip: its name.
      schedule: of the kernel.
      config: with queries, blocks_per_step and depth.
      width: numbers fetched per key.
      around: bytes that come and go once per tile.
      pair: FLOPs per tile and key.
    """
    blocks, per_step = distinct_blocks(shape, config.queries), config.blocks_per_step
    steps = (blocks + (per_step - 1) / 2) / per_step
    tiles = shape.batch * shape.num_kv_heads * shape.num_queries / config.queries
    # Places of the last step without a block fetch the last one again.
    fetched = steps * per_step * shape.block_size * width * _HALF
    return Expected(
        {"Lm0": tiles / CHIPS[chip].num_cores} | _ring(schedule, steps, config.depth),
        tiles * (fetched + around),
        tiles * blocks * shape.block_size * pair,
    )


def _key_value_gradient(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("sparse_attention_gradient", shape, chip)
    rows = config.queries * _group(shape)
    tile = 2 * rows * shape.head_dim * _HALF + NUM_STATISTICS * _lanes(rows) * _WORD
    tiles = distinct_blocks(shape, config.queries) * shape.block_size / config.queries
    return _over_tiles(
        schedule,
        chip,
        owners=shape.batch * shape.num_kv_heads * shape.length // shape.block_size,
        tiles=tiles,
        per_slice=slice_length(shape, chip),
        per_step=config.tiles_of(rows)[0],
        depth=config.depth,
        tile_bytes=tile,
        owner_bytes=4 * shape.block_size * shape.head_dim * _HALF,
        flops=shape.block_size * 8 * rows * shape.head_dim,
    )


def _index_k_gradient(shape: Shape, chip: str, schedule: Section) -> Expected:
    config = config_of("index_kl", shape, chip)
    blocks = distinct_blocks(shape, config.queries) * shape.num_kv_heads
    keys = shape.num_kv_heads * shape.head_dim + shape.index_dim
    pair = 2 * (_group(shape) * shape.head_dim + 2 * shape.index_dim)
    return _over_tiles(
        schedule,
        chip,
        owners=shape.batch * shape.length // shape.block_size,
        tiles=blocks * shape.block_size / config.queries,
        per_slice=config.tiles_per_slice,
        per_step=config.tiles_per_step,
        depth=config.depth,
        tile_bytes=_alignment_tile(shape, config.queries),
        owner_bytes=shape.block_size * (keys * _HALF + shape.index_dim * _WORD),
        flops=shape.block_size * config.queries * pair,
    )


def _over_tiles(
    schedule: Section,
    chip: str,
    *,
    owners: int,
    tiles: float,
    per_slice: int,
    per_step: int,
    depth: int,
    tile_bytes: int,
    owner_bytes: int,
    flops: int,
) -> Expected:
    """Of a kernel whose grid is slices of the tiles that need a block, its owner.

    Args:
      schedule: of the kernel.
      chip: its name.
      owners: blocks.
      tiles: that need one.
      per_slice: at most.
      per_step: fetched at once.
      depth: steps in flight.
      tile_bytes: of a tile.
      owner_bytes: that come and go once per owner.
      flops: per owner and tile.
    """
    slices = slices_per_owner(tiles, per_slice)
    steps = slices_per_owner(tiles, per_step)  # a step is a slice's slice
    counts = {"Lm0": owners * slices / CHIPS[chip].num_cores, "Lm0.B*": 1 / slices}
    return Expected(
        counts | _ring(schedule, steps / slices, depth, partial=1 / slices),
        owners * (steps * per_step * tile_bytes + owner_bytes),
        owners * tiles * flops,
    )


def _ring(schedule: Section, steps: float, depth: int, partial: float = 1) -> Counts:
    """Lm0.Lc0: first copies that the tile before has not started; Lm0.Lm0: steps.

    A step starts the copies of one ahead, and then multiplies in one of its branches, by how much
    of it has blocks: whole ones take the largest, others each as often.

    Args:
      schedule: of the kernel.
      steps: of a tile.
      depth: steps in flight.
      partial: those of a tile's steps that are not whole.
    """
    filled = max(0.0, depth - 1 - steps)
    counts = {"Lm0.Lc0": filled, "Lm0.Lm0": steps, "Lm0.Lm0.Bc0": 1 - filled / steps}
    branches = [
        section
        for section in schedule.walk()
        if section.path.startswith("Lm0.Lm0.Bm") and section.product_cycles
    ]
    branches.sort(key=lambda section: section.product_cycles)
    counts |= {section.path: partial / (steps * len(branches)) for section in branches}
    if branches:
        counts[branches[-1].path] += 1 - partial / steps
    return counts


def _group(shape: Shape) -> int:
    return shape.num_heads // shape.num_kv_heads


def _lanes(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _alignment_tile(shape: Shape, queries: int) -> int:
    """Bytes of a tile's queries, index queries and statistics in the KL."""
    words = shape.index_dim + LANES
    return queries * (_group(shape) * shape.head_dim * _HALF + words * _WORD)


def _grid(schedule: Section) -> int:
    """Steps of the kernel's grid on one core.

    Its loop has two more: one fetches before the first step, one writes behind the last.
    """
    (grid,) = (section for section in schedule.parts if section.path == "Lm0")
    return (grid.trips or 2) - 2


KERNELS: dict[str, Entry] = {
    "select_blocks": _selection,
    "sparse_attention_forward": _forward,
    "sparse_attention_query_gradient": _query_gradient,
    "sparse_attention_key_value_gradient": _key_value_gradient,
    "index_kl_divergence": _divergence,
    "index_kl_index_q_gradient": _index_q_gradient,
    "index_kl_index_k_gradient": _index_k_gradient,
}


def expected(kernel: str, shape: Shape, chip: str, schedule: Section) -> Expected:
    """What is known of a kernel's run; nothing, if it has no entry.

    Args:
      kernel: the name of its instruction in the compiled text.
      shape: of the call.
      chip: a key of `pallas_kernels.mosaic_tpu.CHIPS`.
      schedule: all its sections.
    """
    entry = KERNELS.get(plain_name(kernel))
    return entry(shape, chip, schedule) if entry else Expected()
