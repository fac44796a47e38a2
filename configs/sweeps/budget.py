"""How many blocks, and how large: K x Bk at one budget of tokens and at several.

    python -m experiments.sweep --sweep=configs/sweeps/budget.py --workdir=runs/sweeps/budget

A grid of eight: on its diagonals the budget K Bk stays the same (512, 1024, 2048), along its rows
and columns it doubles. The base is the comparison's MSA model at 8K tokens.

Hardware: made for one GPU of 80 GB; no GPU has run it.
Expected result: not measured yet.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/comparison.py",
        parameters=(
            Choice("attention.top_k", (4, 8, 16, 32)),
            Choice("attention.block_size", (64, 128)),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
            Objective("attention_flops", "minimize"),
        ),
    )
