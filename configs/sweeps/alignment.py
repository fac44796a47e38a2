"""How the index branch learns: the weight of its loss, and how long it learns over all blocks.

    python -m experiments.sweep --sweep=configs/sweeps/alignment.py --workdir=runs/sweeps/alignment

A grid of nine: lambda by steps of dense warm-up. The base is the comparison's MSA model, whose rows
are as short as its budget up to step 2,400, where sparse attention is dense: so the index learns
densely over long rows for none, 300 or 900 steps.

Hardware: made for one GPU of 80 GB; no GPU has run it.
Expected result: not measured yet.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/comparison.py",
        parameters=(
            Choice("objective.kl_weight", (0.1, 1.0, 10.0)),
            Choice("objective.index_warmup_steps", (2400, 2700, 3300)),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
        ),
    )
