"""Continues a prompt with a trained model.

    python -m experiments.generate --workdir=runs/quickstart/msa --prompt='def main(' --tokens=200

Greedy by default; `--temperature=0.8 --top_p=0.9 --seed=1` samples. The text stops where the model
ends the document.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from msa_jax.data.tokenizer import encode_prompt, load_tokenizer
from msa_jax.decoding import generate
from msa_jax.train.initialize import load_model


def main(argv: Sequence[str]) -> None:
    """Loads the latest checkpoint and prints the continuation."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.workdir:
        raise cli.UsageError("--workdir is missing: name the directory of a trained run")
    model, config = load_model(values.workdir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = encode_prompt(tokenizer, values.prompt)
    try:
        new = generate(
            model,
            jnp.asarray(prompt)[None],
            max_new_tokens=values.tokens,
            temperature=values.temperature,
            top_p=values.top_p,
            stop_token=tokenizer.separator_id,
            key=jax.random.key(values.seed),
        )
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    print(values.prompt + tokenizer.decode(jax.device_get(new[0])))


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run; required", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_integer("tokens", 200, "how many tokens to generate", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "of sampling; 0 is greedy", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "nucleus that is sampled from", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
