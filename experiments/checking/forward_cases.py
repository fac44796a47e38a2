"""Cases of the forward pass: attention to given blocks, and their selection."""

import itertools
from collections.abc import Iterator
from typing import Any

from experiments.benchmarking.cases import Case as Shape
from experiments.checking.cases import (
    WHOLE,
    AttentionCase,
    Check,
    Place,
    PrecisionCase,
    SelectionCase,
)

SCHEMES = ("auto", "union", "kv_outer")


def shape(length: int, **fields: Any) -> Shape:
    """A shape whose rows are all compared, unless `sampled_rows` says how many."""
    sizes: dict[str, Any] = {"sampled_rows": 0} | fields
    return Shape("msa", length, **sizes)


def _by_all_schemes(
    shape: Shape, selection: str, dtype: str = "bfloat16", place: Place = WHOLE
) -> Iterator[Check]:
    for scheme in SCHEMES:
        yield AttentionCase(shape, selection, scheme, dtype, place)


def attention(
    length: int, rows: int, selections: tuple[str, ...], seeds: tuple[int, ...]
) -> Iterator[Check]:
    """All selections by all seeds, each by all schemes."""
    for selection, seed in itertools.product(selections, seeds):
        yield from _by_all_schemes(shape(length, sampled_rows=rows, seed=seed), selection)


def attention_at_2k() -> Iterator[Check]:
    """Every selection, and every seed, of one compiled program per scheme."""
    yield from attention(2048, 0, ("one_block", "no_overlap", "strewn", "masked"), (0,))
    yield from attention(2048, 0, ("learned", "random"), (0, 1, 2))


def shapes() -> Iterator[Check]:
    """Group sizes 1 to 64, both head dims and block sizes, 1 to 64 blocks, both dtypes."""
    for heads, kv_heads, head_dim, block_size, top_k, dtype in (
        (4, 4, 128, 128, 16, "bfloat16"),
        (2, 2, 64, 64, 1, "bfloat16"),
        (8, 2, 64, 64, 4, "bfloat16"),
        (8, 2, 128, 128, 64, "float16"),
        (16, 2, 128, 64, 16, "bfloat16"),
        (24, 2, 64, 128, 16, "float16"),
        (32, 2, 64, 128, 1, "bfloat16"),
        (32, 2, 128, 128, 16, "float16"),
        (64, 1, 128, 128, 64, "bfloat16"),
        (128, 2, 64, 64, 4, "bfloat16"),
    ):
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"block_size": block_size, "top_k": top_k}
        yield from _by_all_schemes(shape(1500, **sizes), "random", dtype)


def places() -> Iterator[Check]:
    """Ragged lengths, offsets, packed documents with padding, chunks."""
    small = {"num_heads": 32, "num_kv_heads": 2}
    two = small | {"batch": 2}
    yield from _by_all_schemes(shape(1999, **small), "strewn")
    yield from _by_all_schemes(shape(2100, **small), "strewn", place=Place(777, 1200))
    yield from _by_all_schemes(shape(2048, **two), "strewn", place=Place(600, (1200, 1448)))
    packed = shape(2048, **two, block_size=64)
    for place in (Place(packed=True), Place(900, (300, 1148), packed=True)):
        for selection in ("learned", "random"):
            yield from _by_all_schemes(packed, selection, place=place)
    yield AttentionCase(shape(2048, **small), "random", "kv_outer", chunked=True)


def at_128k() -> Iterator[Check]:
    """One process for what takes most memory; the 8-bit index at 32K is there for comparison."""
    yield from attention(2**17, 128, ("learned", "random"), (0,))
    for length, inputs in itertools.product((2**15, 2**17), ("random", "correlated")):
        yield PrecisionCase(shape(length), inputs)


def selection_at_2k() -> Iterator[Check]:
    """Scores that are exact, so that the ids must be; then random ones."""
    few = {"num_heads": 32, "num_kv_heads": 2}
    packed = few | {"batch": 2}
    yield SelectionCase(shape(2048))
    yield SelectionCase(shape(2048), cut_up=True)
    yield SelectionCase(shape(2048, **few, block_size=64, index_dim=64), dtype="float16")
    yield SelectionCase(shape(2048, **few, block_size=64), local_blocks=3, sink_blocks=2)
    yield SelectionCase(shape(1999, **few))
    yield SelectionCase(shape(2100, **few), place=Place(777, 1200))
    yield SelectionCase(shape(2048, **packed), sink_blocks=1, place=Place(packed=True))
    place = Place(900, (300, 1148), packed=True)
    yield SelectionCase(shape(2048, **packed), local_blocks=2, place=place, cut_up=True)
    for top_k in (1, 4):
        yield SelectionCase(shape(2048, **few, top_k=top_k))
    for seed in range(3):
        yield SelectionCase(shape(2048, seed=seed), "random")
    yield SelectionCase(shape(2048), "random", "int8")
    yield SelectionCase(shape(2048, **few, block_size=64, index_dim=64), "random", "int8")
    yield SelectionCase(shape(2048, **packed), "random", "int8", place=Place(packed=True))


def long_selection() -> Iterator[Check]:
    """8K to 128K tokens: exact scores, random ones, both precisions, 64 blocks."""
    for length, rows in ((2**13, 512), (2**15, 512), (2**17, 128)):
        sampled = shape(length, sampled_rows=rows)
        yield SelectionCase(sampled)
        yield SelectionCase(sampled, "random")
        yield SelectionCase(sampled, "correlated")
        yield SelectionCase(sampled, "random", "int8")
    yield SelectionCase(shape(2**13, sampled_rows=512, seed=1), "random", cut_up=True)
    yield SelectionCase(shape(2**13, sampled_rows=512, top_k=64))
    yield SelectionCase(shape(2**13, sampled_rows=512, top_k=64), cut_up=True)
    many = {"top_k": 64, "block_size": 64, "index_dim": 64}
    yield SelectionCase(shape(2**15, sampled_rows=512, **many), sink_blocks=1)


def selection_at_1m() -> Iterator[Check]:
    """Both precisions."""
    for precision in ("native", "int8"):
        yield SelectionCase(shape(2**20, sampled_rows=64), "random", precision)
