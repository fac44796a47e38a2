"""What the mixers cost that keep a latent or a state instead of keys and values.

Under the conventions of `msa_jax.cost`, which asks here for `attention.kind` "mla", "linear" and
"mamba2". All counts are of one layer; those of "mamba2" need the width of the model.
"""

from typing import NamedTuple

from msa_jax.config import AttentionConfig, MixerKind

KINDS: tuple[MixerKind, ...] = ("mla", "linear", "mamba2")
RECURRENT_KINDS: tuple[MixerKind, ...] = ("linear", "mamba2")

# Bytes of a number of a recurrent state, which is float32 whatever the activations are.
_STATE_BYTES = 4


class MixerParameters(NamedTuple):
    """Trainable parameters of one layer's mixer.

    Attributes:
      matrices: weights with one multiply-add per token each: projections and short convolutions.
      vectors: norm gains, biases, decay rates and skips.
    """

    matrices: int
    vectors: int


def mixer_parameters(attention: AttentionConfig, d_model: int) -> MixerParameters:
    """Parameters of a mixer of one of `KINDS`."""
    return {"mla": _mla, "linear": _linear, "mamba2": _mamba2}[attention.kind](attention, d_model)


def _mla(attention: AttentionConfig, d_model: int) -> MixerParameters:
    sizes, heads, value_dim = attention.mla, attention.num_heads, attention.mla_value_dim
    query_dim, query_latent = attention.head_dim + sizes.rope_head_dim, sizes.query_latent_dim
    queries = (query_latent or d_model) * heads * query_dim + d_model * query_latent
    latents = d_model * (sizes.latent_dim + sizes.rope_head_dim)
    expansion = sizes.latent_dim * heads * (attention.head_dim + value_dim)
    return MixerParameters(
        queries + latents + expansion + heads * value_dim * d_model,
        sizes.latent_dim + query_latent,
    )


def _linear(attention: AttentionConfig, d_model: int) -> MixerParameters:
    heads, value_dim = attention.num_heads, attention.linear_value_dim
    channels = 2 * attention.head_dim + value_dim
    projections = d_model * heads * (channels + 2 * value_dim + 2)  # qkv, gate, o, two gates
    return MixerParameters(
        projections + attention.linear.conv_width * heads * channels, 2 * heads + value_dim
    )


def _mamba2(attention: AttentionConfig, d_model: int) -> MixerParameters:
    sizes = attention.mamba2
    heads, inner = sizes.num_heads(d_model), sizes.expand * d_model
    convolved = inner + 2 * sizes.state_dim
    projections = d_model * (2 * inner + convolved + heads)  # gate, o, x with b and c, step
    return MixerParameters(
        projections + sizes.conv_width * convolved, convolved + 3 * heads + inner
    )


def mixer_flops(attention: AttentionConfig, length: int, d_model: int | None = None) -> int:
    """Forward FLOPs over a document of `length` tokens, projections excluded.

    Latent attention: scores and values of every causal pair, of expanded heads. Recurrent mixers:
    the recurrence's own products with a head's state, whatever a chunked algorithm computes in
    their place: three for the delta rule (what the key finds, what is written, what the query
    reads), two for the state space (written, read).

    Args:
      attention: the layer's mixer, of one of `KINDS`.
      length: tokens of the document.
      d_model: width of the model, for `kind="mamba2"`.

    Raises:
      ValueError: `kind="mamba2"` without `d_model`.
    """
    if attention.kind == "mla":
        query_dim = attention.head_dim + attention.mla.rope_head_dim
        pairs = length * (length + 1) // 2
        return 2 * attention.num_heads * (query_dim + attention.mla_value_dim) * pairs
    products = {"linear": 3, "mamba2": 2}[attention.kind]
    return 2 * products * state_size(attention, d_model) * length


def state_size(attention: AttentionConfig, d_model: int | None = None) -> int:
    """Numbers in the state of one layer of `RECURRENT_KINDS`; raises as `mixer_flops`."""
    if attention.kind == "linear":
        return attention.num_heads * attention.head_dim * attention.linear_value_dim
    return _inner_width(attention, d_model) * attention.mamba2.state_dim


def mixer_cache_bytes(
    attention: AttentionConfig, length: int, d_model: int | None = None, *, dtype_bytes: int
) -> int:
    """Bytes that one layer keeps of `length` tokens, all of which decoding reads; batch 1.

    Latents and rotated keys, or a state in float32 and the short convolutions' last inputs. Raises
    as `mixer_flops`.
    """
    if attention.kind == "mla":
        return dtype_bytes * length * (attention.mla.latent_dim + attention.mla.rope_head_dim)
    if attention.kind == "linear":
        width = attention.linear.conv_width
        channels = attention.num_heads * (2 * attention.head_dim + attention.linear_value_dim)
    else:
        width = attention.mamba2.conv_width
        channels = _inner_width(attention, d_model) + 2 * attention.mamba2.state_dim
    tails = dtype_bytes * (width - 1) * channels
    return _STATE_BYTES * state_size(attention, d_model) + tails


def _inner_width(attention: AttentionConfig, d_model: int | None) -> int:
    if d_model is None:
        raise ValueError(
            "d_model=None: the inner width of attention.kind='mamba2' is a multiple of it; pass "
            "config.model.d_model"
        )
    return attention.mamba2.expand * d_model
