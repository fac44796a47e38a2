"""How the index branch learns: the weight of its loss, and how long it learns over all blocks.

    python -m experiments.sweep --sweep=configs/sweeps/alignment.py --workdir=runs/sweeps/alignment

A grid of nine: lambda by steps of dense warm-up. Each is 500 steps of continued pretraining at 8K
tokens from the comparison's GQA model, `runs/comparison/gqa_0`, which must have been trained.

Hardware: one GPU of 80 GB.
Expected result: losses of 0.557 to 0.558; score recall rises with the warm-up, by 0.8 points; see
docs/results.md.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/comparison.py:cpt",
        parameters=(
            Choice("objective.kl_weight", (0.1, 1.0, 10.0)),
            Choice("objective.index_warmup_steps", (0, 50, 300)),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
        ),
    )
