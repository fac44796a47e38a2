"""Writes one layer's index and main inputs, of a trained model on a text, for the benchmark.

    python -m experiments.capture_inputs --workdir=runs/quickstart/msa --text=README.md \
        --layer=2 --output=runs/captured.npz
    python -m experiments.benchmark --selections=captured --inputs=runs/captured.npz ...

The benchmark reads index_q [tokens, Hkv, Di] and index_k [tokens, Di] and repeats them to its
length; the file also holds q, k and v. Prints how many distinct blocks 4 and 8 neighbouring queries
select there. Text beyond the length that the model was trained at is new to its positions.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.benchmarking.inputs import mean_union
from msa_jax.attention import Mode
from msa_jax.attention.msa import MSAttention
from msa_jax.data.tokenizer import encode_prompt, load_tokenizer
from msa_jax.model import Transformer
from msa_jax.train.initialize import load_model
from pallas_kernels import select_blocks


def main(argv: Sequence[str]) -> None:
    """Captures, prints the overlap and writes the file."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.workdir or not values.text:
        raise cli.UsageError("--workdir and --text are needed: a trained run and a file to read")
    model, config = load_model(values.workdir)
    try:
        text = pathlib.Path(values.text).read_text(encoding="utf-8")
    except OSError as error:
        raise cli.UsageError(f"--text={values.text}: {error}") from error
    count = values.tokens or config.data.sequence_length
    tokens = encode_prompt(load_tokenizer(config.data.tokenizer), text)[:count]
    arrays = capture(model, jnp.asarray(tokens)[None], values.layer)

    attention = config.attention
    sizes = {"block_size": attention.block_size, "top_k": attention.top_k}
    ids = select_blocks(arrays["index_q"], arrays["index_k"], **sizes).block_ids
    first = attention.block_size * attention.top_k
    unions = ", ".join(f"{mean_union(ids, n, first):.2f} over {n}" for n in (4, 8))
    print(f"{len(tokens)} tokens, {attention.top_k} blocks per query; distinct: {unions} queries")
    pathlib.Path(values.output).parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {
        name: np.asarray(array[0], np.float32) for name, array in arrays.items()
    }
    np.savez_compressed(values.output, **rows)


def capture(model: Transformer, tokens: jax.Array, layer: int) -> dict[str, jax.Array]:
    """What the attention ops of one layer get.

    Args:
      model: with an index branch in that layer.
      tokens: [B, T].
      layer: its number, from 0.

    Returns:
      q, k, v, index_q and index_k, with their batch axis.

    Raises:
      UsageError: there is no such layer, or it has no index branch.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    place = {"positions": positions, "segment_ids": None, "cache": None, "mode": Mode()}
    x, shared, number = model.embedding.encode(tokens), None, 0
    for stage, layers in zip(model.plan, model.stages, strict=True):
        for repeat in range(stage.repeats):
            for block in jax.tree.map(lambda a, i=repeat: a[i], layers):
                if number == layer:
                    return _inputs(block.mixer, block.mixer_norm(x), positions)
                x, _, shared, _ = block(x, shared=shared, **place)
                number += 1
    raise cli.UsageError(f"--layer={layer}: the model has layers 0 to {number - 1}")


def _inputs(mixer, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    if not isinstance(mixer, MSAttention) or mixer.index is None:
        raise cli.UsageError("this layer selects no blocks by an index branch: choose another")
    names = ("q", "k", "v", "index_q", "index_k")
    return dict(
        zip(names, (*mixer.main.heads(x, positions), *mixer.index(x, positions)), strict=True)
    )


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run; required", flag_values=values)
    flags.DEFINE_string("text", None, "file that the model reads; required", flag_values=values)
    flags.DEFINE_integer("layer", 0, "from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("tokens", 0, "at most; 0: as trained", 0, flag_values=values)
    flags.DEFINE_string("output", "runs/captured.npz", "the file", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
