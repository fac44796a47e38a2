"""Cases of training: gradients of attention to given blocks, and the KL loss with its own."""

from collections.abc import Iterator

from experiments.benchmarking.cases import Case as Shape
from experiments.checking.cases import (
    PREFIX,
    AlignmentCase,
    AttentionCase,
    Check,
    GradientCase,
    Place,
)
from experiments.checking.forward_cases import SCHEMES, shape, shapes


def gradients_at_2k() -> Iterator[Check]:
    """Every kind of list."""
    for selection in ("random", "learned", "one_block", "masked"):
        yield GradientCase(shape(2048), selection)


def gradients() -> Iterator[Check]:
    """A small model's, places of the queries, 32 of 64 blocks, shapes."""
    for selection in ("learned", "random"):
        yield GradientCase(_comparison(), selection)
        yield GradientCase(_comparison(), selection, rematerialised=True)
        yield GradientCase(_comparison(), selection, stacked=True)
    two = {"num_heads": 32, "num_kv_heads": 2, "batch": 2}
    yield GradientCase(shape(2048, **two), "random", chunked=True)
    yield GradientCase(shape(2048, **two), "strewn", place=Place(600, (1200, 1448)))
    for place in (Place(packed=True), Place(900, (300, 1148), packed=True)):
        yield GradientCase(shape(2048, **two, block_size=64), "random", place=place)
    yield GradientCase(_half_of_the_blocks(), "random")
    for case in shapes():
        if isinstance(case, AttentionCase) and case.scheme == SCHEMES[0]:
            yield GradientCase(case.shape, case.selection, case.dtype)


def alignment_at_2k() -> Iterator[Check]:
    """Every kind of list, and the causal prefix."""
    for selection in ("random", "learned", "one_block", "masked", PREFIX):
        yield AlignmentCase(shape(2048), selection)


def alignment() -> Iterator[Check]:
    """A small model's, places of the queries, 32 of 64 blocks, shapes."""
    for selection in ("learned", "random", PREFIX):
        yield AlignmentCase(_comparison(), selection)
    two = {"num_heads": 32, "num_kv_heads": 2, "batch": 2}
    yield AlignmentCase(shape(2048, **two, index_dim=64), "random")
    yield AlignmentCase(shape(1999, **two), PREFIX, "float16")
    yield AlignmentCase(shape(2048, **two), "strewn", place=Place(600, (1200, 1448)))
    for place in (Place(packed=True), Place(900, (300, 1148), packed=True)):
        yield AlignmentCase(shape(2048, **two, block_size=64), "random", place=place)
    yield AlignmentCase(_half_of_the_blocks(), "random")
    for case in shapes():
        if isinstance(case, AttentionCase) and case.scheme == SCHEMES[0]:
            yield AlignmentCase(case.shape, case.selection, case.dtype)


def _half_of_the_blocks() -> Shape:
    return shape(4096, num_heads=8, num_kv_heads=2, block_size=64, top_k=32)


def _comparison() -> Shape:
    """A group of `configs/comparison.py`, whole: as long, as narrow."""
    return shape(8192, num_heads=8, num_kv_heads=1, head_dim=64, block_size=64, index_dim=64)
