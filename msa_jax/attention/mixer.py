"""The one interface behind which every token mixer stands."""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from msa_jax.cache import Cache

# What a policy of rematerialisation calls a selection.
BLOCK_IDS = "block_ids"


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a forward pass runs; static, part of what is compiled.

    Attributes:
      phase: "warmup" attends densely and aligns the index branch over the whole causal prefix,
        "sparse" attends to the selected blocks. Only MSA tells the two apart.
      losses: compute the auxiliary losses, which evaluation and decoding do without.
      diagnostics: compute the selection metrics, at the cost of a dense pass.
      selections: report the block ids themselves, as `aux["block_ids"]` [B, Hkv, T, K].
      prefill: the cache that is given is empty, so that queries attend to the tokens of this call
        alone: as without a cache, by the same kernels. Nothing checks that it is.
    """

    phase: Literal["warmup", "sparse"] = "sparse"
    losses: bool = False
    diagnostics: bool = False
    selections: bool = False
    prefill: bool = False


class MixerOutput(NamedTuple):
    """What a mixer returns.

    Attributes:
      y: the output, shaped as x.
      cache: the cache with these tokens in it, None if none was given.
      shared: what this mixer lends to the layers above, for those that reuse a selection.
      aux: what this layer reports, by name; mostly scalars.
    """

    y: Float[Array, "B T M"]
    cache: Cache | None
    shared: Any
    aux: dict[str, Array]


@runtime_checkable
class Mixer(Protocol):
    """A causal map from a sequence to a sequence."""

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        shared: Any = None,
        mode: Mode = Mode(),
    ) -> MixerOutput:
        """Mixes tokens within documents.

        Args:
          x: layer input, already normed.
          positions: place of each token in its document; by default counted from the cached ones.
          segment_ids: document of each token, 0 for padding; None for one document per row.
            Not together with a cache.
          cache: tokens seen before, one document per row; from this mixer's `init_cache`.
          shared: `MixerOutput.shared` of the layer below.
          mode: see `Mode`.
        """
        ...

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `max_length` tokens per row."""
        ...
