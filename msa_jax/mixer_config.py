"""Sections of `AttentionConfig` that only one kind of mixer reads."""

import dataclasses

from msa_jax.validation import require


def _require_at_least(section: object, path: str, least: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value >= least, f"{path}.{name}", value, f"must be >= {least}")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention, `attention.kind="mla"` (DeepSeek-V2, arXiv 2405.04434).

    Of `AttentionConfig` it reads `num_heads`, `head_dim` (the part of queries and keys without
    position), `rope_theta` and `implementation`.

    Attributes:
      latent_dim: dims of the latent that keys and values of all heads are made from.
      query_latent_dim: the same for queries; 0 projects them in one step.
      rope_head_dim: dims that rotate, of each query head and of the one key that all heads share;
        they come on top of `attention.head_dim`.
      value_dim: dims of each value head; 0 takes `attention.head_dim`.
    """

    latent_dim: int = 512
    query_latent_dim: int = 0
    rope_head_dim: int = 64
    value_dim: int = 0

    def __post_init__(self):
        path = "attention.mla"
        _require_at_least(self, path, 1, "latent_dim")
        _require_at_least(self, path, 0, "query_latent_dim", "value_dim")
        require(
            self.rope_head_dim >= 0 and self.rope_head_dim % 2 == 0,
            f"{path}.rope_head_dim",
            self.rope_head_dim,
            "must be even and >= 0",
        )


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """Gated DeltaNet, `attention.kind="linear"` (arXiv 2412.06464).

    Of `AttentionConfig` it reads `num_heads` and `head_dim` (of queries and keys).

    Attributes:
      value_dim: dims of each value head; 0 takes `attention.head_dim`, the paper's models have
        twice that.
      conv_width: tokens that the short convolution of queries, keys and values sees.
      chunk_size: tokens computed at once; changes speed, not results. A power of two.
    """

    value_dim: int = 0
    conv_width: int = 4
    chunk_size: int = 64

    def __post_init__(self):
        path = "attention.linear"
        _require_at_least(self, path, 0, "value_dim")
        _require_at_least(self, path, 1, "conv_width", "chunk_size")
        require(
            self.chunk_size & (self.chunk_size - 1) == 0,
            f"{path}.chunk_size",
            self.chunk_size,
            "must be a power of two",
        )


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2, `attention.kind="mamba2"` (arXiv 2405.21060).

    It reads nothing else of `AttentionConfig`: its heads are as many as `head_dim` makes of the
    inner width.

    Attributes:
      state_dim: columns of each head's state.
      expand: inner width as a multiple of `model.d_model`.
      head_dim: rows of each head's state; divides the inner width.
      conv_width: tokens that the short convolution sees.
      chunk_size: tokens computed at once; changes speed, not results.
    """

    state_dim: int = 128
    expand: int = 2
    head_dim: int = 64
    conv_width: int = 4
    chunk_size: int = 128

    def __post_init__(self):
        names = ("state_dim", "expand", "head_dim", "conv_width", "chunk_size")
        _require_at_least(self, "attention.mamba2", 1, *names)

    def num_heads(self, d_model: int) -> int:
        """Heads of a layer of this width.

        Raises:
          ConfigError: `head_dim` does not divide the inner width.
        """
        inner = self.expand * d_model
        require(
            inner % self.head_dim == 0,
            "attention.mamba2.head_dim",
            self.head_dim,
            f"must divide the inner width {inner} (attention.mamba2.expand * model.d_model)",
        )
        return inner // self.head_dim
