"""How many blocks, and how large: K x Bk at one budget of tokens and at several.

    python -m experiments.sweep --sweep=configs/sweeps/budget.py --workdir=runs/sweeps/budget

A grid of eight: on its diagonals the budget K Bk stays the same (512, 1024, 2048), along its rows
and columns it doubles. Each is 500 steps of continued pretraining at 8K tokens from the
comparison's GQA model, `runs/comparison/gqa_0`, which must have been trained.

Hardware: one GPU of 80 GB.
Expected result: losses from 0.554 (K = 32 of 128 tokens) to 0.580 (4 of 64); see docs/results.md.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/comparison.py:cpt",
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
