"""Text generation: one prefill, then one token at a time from the cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from msa_jax.attention import Mode
from msa_jax.cache import after_prompts, before_prompts
from msa_jax.model import Transformer


def generate(
    model: Transformer,
    prompts: Int[Array, "B T"],
    *,
    prompt_lengths: Int[Array, "B"] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_token: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "B max_new_tokens"]:
    """Continues prompts.

    Args:
      model: the model; on a mesh, its parameters must be whole on every device.
      prompts: token ids, padded on the right.
      prompt_lengths: real tokens per prompt, >= 1; all of them by default.
      max_new_tokens: how many to generate.
      temperature: of sampling; 0 takes the most likely token.
      top_p: sample among the fewest most likely tokens whose probability reaches `top_p`.
      stop_token: after it a row repeats it.
      key: random key, needed when temperature > 0.

    Returns:
      The new tokens.

    Raises:
      ValueError: lengths or sampling options out of range, or no key to sample with.
    """
    batch, width = prompts.shape
    if prompt_lengths is None:
        prompt_lengths = jnp.full(batch, width, jnp.int32)
    _check(prompts, prompt_lengths, max_new_tokens, temperature, top_p, key)
    key = jax.random.key(0) if key is None else key
    stop = -1 if stop_token is None else stop_token
    return _generate(model, prompts, prompt_lengths, key, max_new_tokens, temperature, top_p, stop)


@partial(jax.jit, static_argnames=("max_new_tokens", "temperature", "top_p", "stop"))
def _generate(model, prompts, prompt_lengths, key, max_new_tokens, temperature, top_p, stop):
    cache, last = prefill(model, prompts, max_new_tokens, prompt_lengths=prompt_lengths)
    keys = jax.random.split(key, max_new_tokens)
    return decode(model, cache, last, keys, temperature=temperature, top_p=top_p, stop=stop)


def prefill(
    model: Transformer,
    prompts: Int[Array, "B T"],
    max_new_tokens: int,
    *,
    prompt_lengths: Int[Array, "B"] | None = None,
) -> tuple[Any, Float[Array, "B V"]]:
    """The cache of prompts, with room for `max_new_tokens` more, and the logits behind each.

    `prompts` and `prompt_lengths` are as in `generate`; nothing checks them. Only the last logits
    are computed.
    """
    batch, width = prompts.shape
    mode = Mode(prefill=True)
    empty = model.init_cache(batch, width + max_new_tokens)
    if prompt_lengths is None:
        x, cache, _ = model.hidden_states(prompts, cache=empty, mode=mode)
        x = x[:, -1:]
    else:
        # What lies behind each prompt is padding: the next tokens go there.
        ready = before_prompts(empty, prompt_lengths)
        x, cache, _ = model.hidden_states(prompts, cache=ready, mode=mode)
        cache = after_prompts(cache, prompt_lengths)
        x = jnp.take_along_axis(x, (prompt_lengths - 1)[:, None, None], axis=1)
    return cache, model.embedding.decode(x)[:, 0]


def decode(
    model: Transformer,
    cache: Any,
    logits: Float[Array, "B V"],
    keys: Key[Array, "N"],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int = -1,
) -> Int[Array, "B N"]:
    """Tokens one at a time from what `prefill` returned, one for each of the N random keys.

    Sampling is as in `generate`; `stop` is its `stop_token`, -1 for none.
    """
    batch = logits.shape[0]

    def step(carry, key):
        cache, logits, stopped = carry
        token = sample(key, logits, temperature=temperature, top_p=top_p)
        token = jnp.where(stopped, stop, token)
        output = model(token[:, None], cache=cache)
        return (output.cache, output.logits[:, 0], stopped | (token == stop)), token

    _, tokens = jax.lax.scan(step, (cache, logits, jnp.zeros(batch, bool)), keys)
    return tokens.T


def sample(
    key: PRNGKeyArray, logits: Float[Array, "B V"], *, temperature: float, top_p: float
) -> Int[Array, "B"]:
    """One token per row; see `generate`."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.where(mass_before < top_p, ordered, jnp.inf)
        logits = jnp.where(logits >= kept.min(-1, keepdims=True), logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _check(prompts, prompt_lengths, max_new_tokens, temperature, top_p, key) -> None:
    width = prompts.shape[1]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 1")
    if ((prompt_lengths < 1) | (prompt_lengths > width)).any():
        raise ValueError(
            f"prompt_lengths={prompt_lengths.tolist()} must lie between 1 and the width {width} of "
            "prompts, which are padded on the right"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} must be >= 0 and top_p={top_p} must lie in (0, 1]"
        )
    if temperature > 0 and key is None:
        raise ValueError("key=None: sampling at temperature > 0 needs a random key")
