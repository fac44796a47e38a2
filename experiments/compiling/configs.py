"""Tile sizes with which the TPU kernels of an operation are traced: the tuned ones of its shape."""

import dataclasses
from typing import Any

from experiments.compiling.programs import Shape
from pallas_kernels.index_kl.tiles_mosaic_tpu import IndexKLConfig
from pallas_kernels.mosaic_tpu import CHIPS
from pallas_kernels.select_blocks.select_mosaic_tpu import SelectConfig
from pallas_kernels.sparse_attention.backward_mosaic_tpu import BackwardConfig
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig
from pallas_kernels.sparse_attention.mosaic_tpu import MIN_TILE
from pallas_kernels.tuning import shape_bucket, tuned

# Of an operation's kernels the name in the tuned table, the default, and what its bucket names.
_TABLE: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "select_blocks": ("select_blocks.mosaic_tpu", SelectConfig(), ("Di", "Bk")),
    "sparse_attention": ("sparse_attention.tpu_forward", TileConfig(), ("G", "D", "Bk")),
    "sparse_attention_gradient": (
        "sparse_attention.tpu_backward",
        BackwardConfig(),
        ("G", "D", "Bk"),
    ),
    "index_kl": ("index_kl.tpu", IndexKLConfig(), ("G", "D", "Di", "Bk")),
}
_TABLE["index_kl_gradient"] = _TABLE["index_kl"]


def table_name(op: str) -> str:
    """Under which the tuned table has an operation's kernels."""
    return _TABLE[op][0]


def config_of(op: str, shape: Shape, chip: str) -> Any:
    """The config of an operation's kernels, for bfloat16.

    Args:
      op: one that has TPU kernels, of `experiments.compiling.programs.OPERATIONS`.
      shape: of the call.
      chip: a key of `pallas_kernels.mosaic_tpu.CHIPS`.
    """
    name, default, letters = _TABLE[op]
    sizes = {
        "G": shape.num_heads // shape.num_kv_heads,
        "D": shape.head_dim,
        "Di": shape.index_dim,
        "Bk": shape.block_size,
    }
    if shape.num_queries <= MIN_TILE and op != "select_blocks":
        default = dataclasses.replace(default, queries=MIN_TILE)
    bucket = shape_bucket(shape.num_queries, **{letter: sizes[letter] for letter in letters})
    kind = CHIPS[chip].device_kind
    return tuned(name, default, device_kind=kind, dtype="bfloat16", bucket=bucket)
