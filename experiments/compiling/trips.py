"""How often the loops of each kernel run whose number of trips is decided by the data.

`KERNELS` has an entry per kernel that needs one: a function of the shape, the chip's name and the
schedule. Paths of sections are as `python -m experiments.compile_check` prints them.
"""

from collections.abc import Callable

from experiments.compiling.bundles import Section
from experiments.compiling.hlo import plain_name
from experiments.compiling.programs import Shape
from experiments.compiling.timing import Expected
from pallas_kernels.mosaic_tpu import CHIPS
from pallas_kernels.select_blocks.select_mosaic_tpu import SelectConfig
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig
from pallas_kernels.tuning import shape_bucket, tuned

Entry = Callable[[Shape, str, Section], Expected]


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


def _selection(shape: Shape, chip: str, schedule: Section) -> Expected:
    """Lm0: tiles of rows; Lm0.Lm0: chunks of keys; Lm0.L0 and Lm0.L1.L0: groups of 8 blocks."""
    bucket = shape_bucket(shape.num_queries, Di=shape.index_dim, Bk=shape.block_size)
    place = {"device_kind": CHIPS[chip].device_kind, "dtype": "bfloat16", "bucket": bucket}
    unroll = tuned("select_blocks.mosaic_tpu", SelectConfig(), **place).unroll
    (products,) = (section for section in schedule.walk() if section.path == "Lm0.Lm0")
    key_bytes = 2 * shape.index_dim
    chunk = products.copied_bytes // key_bytes
    tiles = _tiles(schedule) * CHIPS[chip].num_cores
    queries = shape.num_queries * shape.batch // tiles
    # Own block of a tile's last query: what is before it is scored.
    offset = shape.length - shape.num_queries + queries - 1
    starts = (offset + tile * queries % shape.num_queries for tile in range(tiles))
    own = [slot // shape.block_size for slot in starts]
    chunks = sum(-(-block * shape.block_size // chunk) for block in own) / tiles
    groups = sum(-(-(block // 8 + 1) // unroll) for block in own) / tiles
    counts = {"Lm0": _tiles(schedule), "Lm0.Lm0": chunks, "Lm0.L0": groups, "Lm0.L1.L0": groups}
    keys = (chunks * chunk + shape.num_kv_heads * queries) * key_bytes
    return Expected(counts, tiles * keys)


def _forward(shape: Shape, chip: str, schedule: Section) -> Expected:
    """Lm0: tiles; Lm0.Lc0: a tile's first copies, which the one before has started; Lm0.Lm0: steps.

    A step is one of its multiplying branches, by how much of it has blocks.
    """
    bucket = shape_bucket(
        shape.num_queries,
        G=shape.num_heads // shape.num_kv_heads,
        D=shape.head_dim,
        Bk=shape.block_size,
    )
    place = {"device_kind": CHIPS[chip].device_kind, "dtype": "bfloat16", "bucket": bucket}
    config = tuned("sparse_attention.tpu_forward", TileConfig(), **place)
    blocks = distinct_blocks(shape, config.queries)
    steps = (blocks + (config.blocks_per_step - 1) / 2) / config.blocks_per_step
    # Where all keys fit into vector memory, XLA puts them there, and no copy is left in the loop.
    counts = {"Lm0": _tiles(schedule), "Lm0.Lc0": 0.0, "Lm0.L0": 0.0, "Lm0.Lm0": steps}
    # Places of a step without a block are filled with zeros in branches.
    counts["Lm0.Lm0.B*"] = 1 - blocks / (steps * config.blocks_per_step)
    counts |= _last_steps(schedule, "Lm0.Lm0", steps)
    tiles = shape.batch * shape.num_kv_heads * shape.num_queries / config.queries
    rows = 2 * config.queries * shape.num_heads // shape.num_kv_heads
    keys = 2 * blocks * shape.block_size
    return Expected(counts, tiles * (rows + keys) * 2 * shape.head_dim)


def _tiles(schedule: Section) -> int:
    """Steps of the kernel's grid on one core.

    Its loop has two more: one fetches before the first step, one writes behind the last.
    """
    (grid,) = (section for section in schedule.parts if section.path == "Lm0")
    return (grid.trips or 2) - 2


def _last_steps(schedule: Section, loop: str, steps: float) -> dict[str, float]:
    """Counts of a loop's branches of which each step takes one: all but the last take the largest.

    The last one takes each as often as any other.
    """
    branches = [
        section
        for section in schedule.walk()
        if section.path.startswith(f"{loop}.Bm") and section.product_cycles
    ]
    branches.sort(key=lambda section: section.product_cycles)
    shares = {section.path: 1 / (steps * len(branches)) for section in branches}
    if branches:
        shares[branches[-1].path] += (steps - 1) / steps
    return shares


KERNELS: dict[str, Entry] = {
    "select_blocks": _selection,
    "sparse_attention_forward": _forward,
}


def expected(kernel: str, shape: Shape, chip: str, schedule: Section) -> Expected:
    """What is known of a kernel's run; nothing, if it has no entry.

    Args:
      kernel: the name of its instruction in the compiled text.
      shape: that it was compiled for.
      chip: a key of `pallas_kernels.mosaic_tpu.CHIPS`.
      schedule: all its sections.
    """
    entry = KERNELS.get(plain_name(kernel))
    return entry(shape, chip, schedule) if entry else Expected()
