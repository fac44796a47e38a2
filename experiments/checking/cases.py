"""What one check is: a call, and the queries that are compared."""

import dataclasses

from experiments.benchmarking.cases import Case as Shape


@dataclasses.dataclass(frozen=True)
class Place:
    """Where queries sit among the keys.

    Attributes:
      num_queries: T, 0 for as many as there are keys.
      query_offset: the key slot of the first query; several are one per row, an array to the op.
      packed: whether rows hold several documents, and padding.
    """

    num_queries: int = 0
    query_offset: int | tuple[int, ...] = 0
    packed: bool = False


WHOLE = Place()

# In the place of a selection: everything that is visible.
PREFIX = "prefix"


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of `sparse_attention`.

    Attributes:
      shape: arrays and seed; `sampled_rows` of the queries are compared, 0 for all.
      selection: which blocks queries select, see `selections.SELECTIONS`.
      scheme: of the kernels.
      dtype: "bfloat16" or "float16".
      place: of the queries.
      chunked: whether KV-outer must go through its queries in several chunks.
    """

    shape: Shape
    selection: str
    scheme: str
    dtype: str = "bfloat16"
    place: Place = WHOLE
    chunked: bool = False


@dataclasses.dataclass(frozen=True)
class GradientCase:
    """The gradients of one call of `sparse_attention`.

    Attributes:
      shape: arrays and seed.
      selection: which blocks queries select, see `selections.SELECTIONS`.
      dtype: "bfloat16" or "float16".
      place: of the queries.
      chunked: whether the backward pass must go through its queries in several chunks.
      rematerialised: whether the backward pass attends again, keeping log-sum-exps alone.
      stacked: whether the call is made in a scan over layers, which slices its arrays from a stack.
    """

    shape: Shape
    selection: str
    dtype: str = "bfloat16"
    place: Place = WHOLE
    chunked: bool = False
    rematerialised: bool = False
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class AlignmentCase:
    """Values and gradients of one call of `index_kl`.

    Attributes:
      shape: arrays and seed.
      selection: which blocks queries select, see `selections.SELECTIONS`; `PREFIX` for no selection
        but the whole causal prefix.
      dtype: "bfloat16" or "float16".
      place: of the queries.
    """

    shape: Shape
    selection: str
    dtype: str = "bfloat16"
    place: Place = WHOLE


@dataclasses.dataclass(frozen=True)
class SelectionCase:
    """One call of `select_blocks`.

    Attributes:
      shape: arrays, options and seed; `sampled_rows` of the queries are compared, 0 for all.
      inputs: "integers", whose scores are exact and often equal, or a kind of benchmark input.
      precision: of the index.
      dtype: "bfloat16" or "float16".
      local_blocks: forced.
      sink_blocks: forced.
      place: of the queries.
      cut_up: whether queries go in several chunks and the top-k in two levels.
    """

    shape: Shape
    inputs: str = "integers"
    precision: str = "native"
    dtype: str = "bfloat16"
    local_blocks: int = 1
    sink_blocks: int = 0
    place: Place = WHOLE
    cut_up: bool = False


@dataclasses.dataclass(frozen=True)
class PrecisionCase:
    """What the 8-bit index costs: selection and output against the native index's.

    Attributes:
      shape: arrays and seed.
      inputs: kind of benchmark index inputs.
    """

    shape: Shape
    inputs: str


type Check = AttentionCase | GradientCase | AlignmentCase | SelectionCase | PrecisionCase


def label(case: Check) -> str:
    """What a case is called: its kind and whatever differs from the defaults."""
    kind = type(case).__name__.removesuffix("Case").lower()
    words = [kind, f"{case.shape.length} tokens"]
    sizes = {"num_heads": 64, "num_kv_heads": 4, "head_dim": 128, "index_dim": 128}
    sizes |= {"block_size": 128, "top_k": 16, "batch": 1, "seed": 0}
    for name, usual in sizes.items():
        if (value := getattr(case.shape, name)) != usual:
            words.append(f"{name} {value}")
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if isinstance(value, str) and value != "bfloat16":
            words.append(value)
        elif isinstance(value, bool) and value:
            words.append(field.name.replace("_", " "))
        elif isinstance(value, int) and value != field.default:
            words.append(f"{field.name.replace('_', ' ')} {value}")
    place = getattr(case, "place", WHOLE)
    if place != WHOLE:
        words.append("packed" if place.packed else "")
        words.append(f"offset {place.query_offset}" if place.query_offset else "")
        words.append(f"{place.num_queries} queries" if place.num_queries else "")
    return ", ".join(word for word in words if word)
