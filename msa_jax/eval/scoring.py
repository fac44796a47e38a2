"""What a model makes of given tokens; never the logits of all of them at once.

Everything here is jitted: it compiles once for each shape.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msa_jax.decoding import decode, prefill
from msa_jax.model import Transformer

# Logits are made of so many tokens at a time: 2 GB in float32 for 256K ids.
LOGIT_TOKENS = 2048


class TokenScores(NamedTuple):
    """Attributes: log_probs, of the targets in nats; greedy, whether a target is the likeliest."""

    log_probs: Float[Array, "B T"]
    greedy: Bool[Array, "B T"]


class AnswerScores(NamedTuple):
    """Attributes: tokens, the greedy continuation; log_probs, of each candidate's tokens, nats."""

    tokens: Int[Array, "B A"]
    log_probs: Float[Array, "B C A"]


@jax.jit
def score_tokens(
    model: Transformer, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> TokenScores:
    """Scores a target at every place of rows of one document each."""
    x, _, _ = model.hidden_states(tokens)
    return score_states(model, x, targets)


def score_states(
    model: Transformer, x: Float[Array, "B T M"], targets: Int[Array, "B T"]
) -> TokenScores:
    """Scores targets against the states of `Transformer.hidden_states`."""

    def score(chunk: tuple[Array, Array]) -> TokenScores:
        states, wanted = chunk
        logits = model.embedding.decode(states[None])[0]
        at_target = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        log_probs = at_target - jax.nn.logsumexp(logits, axis=-1)
        return TokenScores(log_probs, logits.argmax(-1) == wanted)

    count = targets.size
    size = min(LOGIT_TOKENS, count)
    padding = -count % size
    states = jnp.pad(x.reshape(count, -1), ((0, padding), (0, 0)))
    wanted = jnp.pad(targets.reshape(count), (0, padding))
    scores = jax.lax.map(score, (states.reshape(-1, size, x.shape[-1]), wanted.reshape(-1, size)))
    return jax.tree.map(lambda a: a.reshape(-1)[:count].reshape(targets.shape), scores)


@partial(jax.jit, static_argnames="max_new_tokens")
def score_answers(
    model: Transformer,
    prompts: Int[Array, "B T"],
    candidates: Int[Array, "B C A"],
    *,
    max_new_tokens: int,
) -> AnswerScores:
    """Continues prompts greedily, and scores candidate answers, after one prefill.

    Args:
      model: on one device.
      prompts: all of one length.
      candidates: answers, padded on the right to A > 1; what padding scores means nothing.
      max_new_tokens: of the greedy continuation.
    """
    room = max(max_new_tokens, candidates.shape[-1])
    cache, logits = prefill(model, prompts, room)
    # Greedy decoding draws nothing.
    tokens = decode(model, cache, logits, jax.random.split(jax.random.key(0), max_new_tokens))

    def score(answer: Int[Array, "B A"]) -> Float[Array, "B A"]:
        ahead = model(answer[:, :-1], cache=cache).logits
        log_probs = jax.nn.log_softmax(jnp.concatenate([logits[:, None], ahead], axis=1))
        return jnp.take_along_axis(log_probs, answer[..., None], axis=-1)[..., 0]

    log_probs = jax.lax.map(score, candidates.swapaxes(0, 1))
    return AnswerScores(tokens, log_probs.swapaxes(0, 1))


@jax.jit
def choose_tokens(
    model: Transformer,
    tokens: Int[Array, "B T"],
    places: Int[Array, "B P"],
    candidates: Int[Array, "C"],
) -> tuple[Int[Array, "B P"], Int[Array, "B P"]]:
    """The likeliest next token at a few places: of the whole vocabulary, and of `candidates`."""
    x, _, _ = model.hidden_states(tokens)
    x = jnp.take_along_axis(x, places[..., None], axis=1)
    logits = model.embedding.decode(x)
    best = candidates[logits[..., candidates].argmax(-1)]
    return logits.argmax(-1).astype(jnp.int32), best.astype(jnp.int32)
