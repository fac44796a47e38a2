"""cuDNN's flash attention through `jax.nn.dot_product_attention`."""

import jax
from jaxtyping import Array, Float, Int


def dense_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    window: int,
    scale: float,
    return_lse: bool,
) -> tuple[Float[Array, "B T Hq D"]]:
    """Causal attention in one cuDNN call; what that call has no argument for is refused."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"cuDNN needs a CUDA device, this is {jax.default_backend()!r}")
    if return_lse:
        raise NotImplementedError("cuDNN's log-sum-exp arrives rounded to the output's dtype")
    if segment_ids is not None:
        raise NotImplementedError("packed documents would need an explicit mask, which is slow")
    if not (isinstance(query_offset, int) and query_offset == 0 and q.shape[1] == k.shape[1]):
        raise NotImplementedError("cuDNN's causal mask aligns the first query with the first key")
    if q.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 or float16, not {q.dtype}")
    if q.shape[3] % 8 or q.shape[3] > 128:
        raise NotImplementedError(f"head_dim={q.shape[3]} is not a multiple of 8 up to 128")
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return (o,)
