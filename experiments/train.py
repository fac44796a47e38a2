"""Trains one model.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/msa
    python -m experiments.train --config=configs/quickstart.py:gqa --workdir=runs/gqa
    python -m experiments.train --config=configs/quickstart.py --config.attention.top_k=4 \\
        --workdir=runs/msa_top_4

Every field of `msa_jax.train.config.ExperimentConfig` can be set as `--config.section.field=value`.
What the work directory then holds is described in `msa_jax.train.loop`. The same command again goes
on from the last checkpoint. Ctrl-C or SIGTERM ends a run after the running step, with a checkpoint.

MSA from a trained dense model of the same shape (MSA-CPT):

    python -m experiments.train --config=configs/quickstart.py --config.train.init_from=runs/gqa \\
        --workdir=runs/msa_from_gqa

A baseline as large, or as costly, as another config: its feed-forward, or the field that
--match_field names, is set so that active parameters or training FLOPs are equal. What was set is
printed, and stands in the manifest's config:

    python -m experiments.train --config=configs/quickstart.py:gqa --workdir=runs/gqa_matched \\
        --match=configs/quickstart.py --match_by=flops

Exit code: 0 when all steps are done, 2 after a mistake in the command line, config or checkpoint,
1 when the loss or a gradient became NaN or infinite, 128 + the signal's number after a signal.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from msa_jax import matching
from msa_jax.eval.evaluation import evaluate
from msa_jax.sharding import make_mesh
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.loop import NonFiniteError, train
from msa_jax.train.progress import TrainingProgress

# Enough for a mean that tells models a percent apart.
_FINAL_EVAL_BATCHES = 32


def define_flags(values: flags.FlagValues) -> None:
    """Adds this script's flags."""
    own = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "directory of the run; required", **own)
    flags.DEFINE_string("match", None, "config file whose size or cost this run takes on", **own)
    flags.DEFINE_enum("match_by", "flops", matching.QUANTITIES, "what is matched", **own)
    flags.DEFINE_enum("match_field", None, matching.FIELDS, "what is set for it", **own)


def main(argv: Sequence[str]) -> int:
    """Runs one experiment; returns the exit code."""
    values, config = cli.parse_with_config(argv, define_flags, usage=__doc__ or "")
    if not values.workdir:
        raise cli.UsageError("--workdir is missing: name the run's directory, --workdir=runs/msa")
    return run_experiment(_matched(config, values), pathlib.Path(values.workdir))


def _matched(config: ExperimentConfig, values: flags.FlagValues) -> ExperimentConfig:
    """The config with the size that `--match` asks for."""
    if not values.match:
        for name in ("match_by", "match_field"):
            if values[name].present:
                raise cli.UsageError(f"--{name} needs --match: name the config to be matched")
        return config
    matched = matching.match(
        config,
        cli.load_config("match", values.match),
        by=values.match_by,
        length=config.data.sequence_length,
        field=values.match_field,
    )
    print(f"matched with {values.match}: {matched.report}")
    return matched.config


def run_experiment(config: ExperimentConfig, workdir: pathlib.Path) -> int:
    """Trains, or goes on training, then scores the model on held-out text.

    Returns:
      The exit code.
    """
    progress = TrainingProgress(
        config.train.steps, title=workdir.name, plain_every=config.train.log_every
    )
    try:
        with progress:
            result = train(config, workdir, progress=progress)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.interrupted is not None:
        return 128 + result.interrupted
    progress.message(f"{workdir.name}: final evaluation")
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    evaluate(config, result.state, mesh, workdir, num_batches=_FINAL_EVAL_BATCHES)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
