"""With and without the gradient's detach: what the index branch's loss does to the model.

    python -m experiments.sweep --sweep=configs/sweeps/detach.py --workdir=runs/sweeps/detach

A grid of six: the index branch's input detached or not, by lambda. Undetached, the KL loss reaches
the residual stream, where a model can lower it by making attention easier to imitate. Each is 500
steps of continued pretraining at 8K tokens from the comparison's GQA model,
`runs/comparison/gqa_0`, which must have been trained.

Hardware: one GPU of 80 GB.
Expected result: 0.557 detached, whatever lambda; undetached 0.561, 0.597 and a lost model; see
docs/results.md.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/comparison.py:cpt",
        parameters=(
            Choice("attention.detach_index_input", (True, False)),
            Choice("objective.kl_weight", (1.0, 10.0, 100.0)),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
        ),
    )
