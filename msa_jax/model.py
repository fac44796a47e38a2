"""The decoder-only transformer: a stack of pre-norm blocks over any token mixer.

Equal neighbouring layers form a stage whose parameters are stacked; a stage runs as one `lax.scan`,
or unrolled with the same numbers (`model.scan_layers=False`, to step through with JIT off).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention import Mode, build_mixer
from msa_jax.attention.mixer import BLOCK_IDS
from msa_jax.config import ArchitectureConfig, AttentionConfig, ConfigError, ModelConfig, Remat
from msa_jax.nn.embedding import Embedding
from msa_jax.nn.feed_forward import FeedForward
from msa_jax.nn.moe import MoE
from msa_jax.nn.norm import RMSNorm
from pallas_kernels.residuals import INDEX_GRADIENTS, LOG_SUM_EXP, OUTPUT


class LayerKind(NamedTuple):
    """All that distinguishes one layer from another."""

    attention: AttentionConfig
    computes_selection: bool
    has_experts: bool


class Stage(NamedTuple):
    """`repeats` runs of the same few layers; more than one if layers share a selection."""

    kinds: tuple[LayerKind, ...]
    repeats: int


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
      logits: float32.
      cache: per stage, with the new tokens in it; None if none was given.
      aux: by name, stacked over the layers that report it, in layer order.
    """

    logits: Float[Array, "B T V"]
    cache: Any
    aux: dict[str, Array]


def plan_stages(config: ArchitectureConfig) -> tuple[Stage, ...]:
    """Groups the layers, in order, into the fewest stages of equal repeats."""
    kinds = [
        LayerKind(
            config.attention_of(layer), config.computes_selection(layer), config.has_experts(layer)
        )
        for layer in range(config.model.num_layers)
    ]
    stages = []
    while kinds:
        period = kinds[0].attention.shared_layers
        pattern, repeats = kinds[:period], 1
        while kinds[repeats * period : (repeats + 1) * period] == pattern:
            repeats += 1
        stages.append(Stage(tuple(pattern), repeats))
        kinds = kinds[repeats * period :]
    return tuple(stages)


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """What the backward pass may keep from the forward pass of a layer.

    "full" keeps the layer's input alone. "save_selection" also what is small beside a layer's
    arrays: block ids, log-sum-exps and the KL's gradients. Selection, whose cost grows as N^2, and
    the KL do not run again, attention does. "attention" keeps the attention output too, so that
    none of them runs twice. "dots" keeps the results of all projections besides, and computes again
    what is between them: norms, rotations and gates, cheap to compute and wide in float32.
    """
    policies = jax.checkpoint_policies
    small = BLOCK_IDS, LOG_SUM_EXP, INDEX_GRADIENTS
    attention = policies.save_only_these_names(*small, OUTPUT)
    return {
        "full": policies.nothing_saveable,
        "save_selection": policies.save_only_these_names(*small),
        "attention": attention,
        "dots": policies.save_from_both_policies(
            attention, policies.dots_with_no_batch_dims_saveable
        ),
    }.get(remat)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
      kind: which mixer and which feed-forward.
      config: sizes.
      rngs: for the initial values.
    """

    def __init__(self, kind: LayerKind, config: ArchitectureConfig, *, rngs: nnx.Rngs):
        model = config.model
        options = {
            "dtype": model.compute_dtype,
            "param_dtype": model.param_dtype,
            # Two branches per layer add to the residual stream.
            "output_scale": 1 / math.sqrt(2 * model.num_layers),
            "rngs": rngs,
        }
        norm = {"eps": model.norm_eps, "param_dtype": model.param_dtype}
        self.mixer_norm = RMSNorm(model.d_model, **norm)
        self.mixer = build_mixer(
            kind.attention,
            model.d_model,
            computes_selection=kind.computes_selection,
            norm_eps=model.norm_eps,
            **options,
        )
        self.ffn_norm = RMSNorm(model.d_model, **norm)
        options["activation"] = model.activation
        if kind.has_experts:
            self.feed_forward = MoE(config.moe, model.d_model, **options)
        else:
            self.feed_forward = FeedForward(model.d_model, model.ffn_dim, **options)

    def __call__(self, x, *, positions, segment_ids, cache, shared, mode):
        """The block's output, cache, what its mixer shares, and its reports."""
        mixed = self.mixer(
            self.mixer_norm(x),
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            shared=shared,
            mode=mode,
        )
        x = x + mixed.y
        normed = self.ffn_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(normed), mixed.cache, mixed.shared, mixed.aux
        routed = self.feed_forward(normed, segment_ids)
        return x + routed.y, mixed.cache, mixed.shared, mixed.aux | routed.aux


class Transformer(nnx.Module):
    """Token ids to logits.

    Example:
      model = Transformer(ArchitectureConfig(...), rngs=nnx.Rngs(0))
      logits = model(tokens).logits

    Args:
      config: the architecture; an `ExperimentConfig` is one too.
      rngs: for the initial values.
    """

    def __init__(self, config: ArchitectureConfig, *, rngs: nnx.Rngs):
        model = config.model
        self.embedding = Embedding(
            model.vocab_size,
            model.d_model,
            tied=model.tie_embeddings,
            dtype=model.compute_dtype,
            param_dtype=model.param_dtype,
            rngs=rngs,
        )
        self.plan = plan_stages(config)
        self.stages = nnx.List([_init_stage(stage, config, rngs) for stage in self.plan])
        self.final_norm = RMSNorm(model.d_model, eps=model.norm_eps, param_dtype=model.param_dtype)
        self.config = ArchitectureConfig(config.model, config.attention, config.moe)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        mode: Mode = Mode(),
    ) -> ModelOutput:
        """Logits for the next token at every place.

        Args:
          tokens: ids below `vocab_size`.
          positions: place of each token in its document; counted by default.
          segment_ids: document of each token, 0 for padding; every document starts on a multiple
            of the attention block size. None for one document per row.
          cache: from `init_cache` or an earlier call; tokens are appended to it.
          mode: see `msa_jax.attention.Mode`.

        Raises:
          ValueError: a document off a block boundary (left padding is one such).
        """
        x, cache, aux = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache, mode=mode
        )
        return ModelOutput(self.embedding.decode(x), cache, aux)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
        mode: Mode = Mode(),
    ) -> tuple[Float[Array, "B T M"], Any, dict[str, Array]]:
        """A call without the logits: `embedding.decode` makes them of any part of the states."""
        model = self.config.model
        x = self.embedding.encode(tokens)
        caches, reports = [], []
        for index, (stage, groups) in enumerate(zip(self.plan, self.stages, strict=True)):
            run = _group_runner(model, positions, segment_ids, mode)
            stage_cache = None if cache is None else cache[index]
            loop = jax.lax.scan if model.scan_layers else _unrolled_scan
            x, (new_cache, aux) = loop(run, x, (groups, stage_cache))
            caches.append(new_cache)
            reports.append(_in_layer_order(aux, stage.repeats))
        names = dict.fromkeys(name for report in reports for name in report)
        aux = {
            name: jnp.concatenate([report[name] for report in reports if name in report])
            for name in names
        }
        return self.final_norm(x), None if cache is None else caches, aux

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Empty caches of every layer for `max_length` tokens per row."""

        def stage_cache(stage: Stage, groups: nnx.List) -> tuple:
            one = tuple(block.mixer.init_cache(batch, max_length) for block in groups)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (stage.repeats, *a.shape)), one)

        return [stage_cache(stage, g) for stage, g in zip(self.plan, self.stages, strict=True)]


def _init_stage(stage: Stage, config: ArchitectureConfig, rngs: nnx.Rngs) -> nnx.List:
    """The stage's layers, parameters stacked over its repeats."""

    def init(key):
        keys = nnx.Rngs(params=key)
        return nnx.List([Block(kind, config, rngs=keys) for kind in stage.kinds])

    return jax.vmap(init)(jax.random.split(rngs.params(), stage.repeats))


def _group_runner(model: ModelConfig, positions, segment_ids, mode: Mode):
    """The scan body: one group of layers, as `(x, (layers, caches)) -> (x, (caches, aux))`."""

    def run(x, layers_and_caches):
        layers, caches = layers_and_caches
        shared, new_caches, reports = None, [], []
        for place, block in enumerate(layers):
            x, cache, shared, aux = block(
                x,
                positions=positions,
                segment_ids=segment_ids,
                cache=None if caches is None else caches[place],
                shared=shared,
                mode=mode,
            )
            new_caches.append(cache)
            reports.append(aux)
        return x, (None if caches is None else tuple(new_caches), reports)

    if model.remat == "none":
        return run
    # Inside a scan the recomputation cannot be merged away, so no barrier is needed.
    return jax.checkpoint(run, policy=remat_policy(model.remat), prevent_cse=not model.scan_layers)


def _unrolled_scan(body, carry, xs):
    """`lax.scan` as a Python loop."""
    length = jax.tree.leaves(xs)[0].shape[0]
    results = []
    for index in range(length):
        carry, y = body(carry, jax.tree.map(lambda a, i=index: a[i], xs))
        results.append(y)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)


def _in_layer_order(reports: list[dict[str, Array]], repeats: int) -> dict[str, Array]:
    """Per place in the group {name: [repeats, ...]} to {name: [layers, ...]}."""
    names = dict.fromkeys(name for report in reports for name in report)
    stacked = {
        name: jnp.stack([report[name] for report in reports if name in report], axis=1)
        for name in names
    }
    return {name: a.reshape(repeats * a.shape[1], *a.shape[2:]) for name, a in stacked.items()}


def require_vocabulary(config: ArchitectureConfig, vocab_size: int) -> None:
    """Raises ConfigError unless a tokenizer's ids fit the model's vocabulary."""
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has {vocab_size} ids; set "
            f"it to {vocab_size} or more"
        )
