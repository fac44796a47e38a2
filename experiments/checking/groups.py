"""What is checked: groups of cases, each group a process of its own on the GPU."""

from experiments.checking.cases import (
    PREFIX,
    AlignmentCase,
    AttentionCase,
    Check,
    GradientCase,
    SelectionCase,
)
from experiments.checking.forward_cases import (
    SCHEMES,
    at_128k,
    attention,
    attention_at_2k,
    long_selection,
    places,
    selection_at_1m,
    selection_at_2k,
    shapes,
)
from experiments.checking.training_cases import (
    alignment,
    alignment_at_2k,
    gradients,
    gradients_at_2k,
)

_KINDS = ("learned", "random", "one_block", "no_overlap")


def groups(
    *, quick: bool, million: bool, implementation: str = "mosaic_gpu"
) -> dict[str, list[Check]]:
    """The cases of a run by group.

    Args:
      quick: 2K tokens alone.
      million: 1M tokens too.
      implementation: what is checked, for it may have less to choose from.
    """
    found = _groups(quick, million)
    if implementation == "mosaic_gpu":
        return found
    chosen = {name: [case for case in cases if _without(case)] for name, cases in found.items()}
    return {name: cases for name, cases in chosen.items() if cases}


def _without(case: Check) -> bool:
    """Whether a case needs no schemes, no chunks, no 8-bit index, no kernel for the prefix."""
    match case:
        case AttentionCase():
            return case.scheme == "auto" and not case.chunked
        case GradientCase():
            return not case.chunked
        case AlignmentCase():
            return case.selection != PREFIX
        case SelectionCase():
            return case.precision == "native" and not case.cut_up
    return False


def _groups(quick: bool, million: bool) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    if not quick:  # the longest first
        found["attention at 8K"] = list(attention(2**13, 512, _KINDS, (0, 1)))
        found["attention at 32K"] = [
            *attention(2**15, 512, _KINDS, (0,)),
            *attention(2**15, 512, ("learned",), (1,)),
        ]
        found["128K"] = list(at_128k())
        found["selection, long"] = list(long_selection())
        found |= _split("shapes", list(shapes()), 3)
        found |= _split("places", list(places()), 2)
        found |= _split("gradients", list(gradients()), 2)
        found |= _split("alignment", list(alignment()), 2)
    found["gradients at 2K"] = list(gradients_at_2k())
    found["alignment at 2K"] = list(alignment_at_2k())
    found["attention at 2K"] = list(attention_at_2k())
    found["selection at 2K"] = list(selection_at_2k())
    if million:
        found["selection at 1M"] = list(selection_at_1m())
        found["attention at 1M"] = list(attention(2**20, 64, ("learned",), (0,)))
    return found


def _split(name: str, cases: list[Check], parts: int) -> dict[str, list[Check]]:
    """Cases in groups of about the same size; schemes of one call stay together."""
    count = len(SCHEMES) * -(-len(cases) // (len(SCHEMES) * parts))
    return {f"{name} {i + 1}": cases[i * count : (i + 1) * count] for i in range(parts)}
