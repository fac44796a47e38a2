"""Twelve tiny models on the standard library's sources: a sweep to try the tools with.

    python -m experiments.sweep --sweep=configs/sweeps/quickstart.py --workdir=runs/sweeps/tiny

Hardware: any machine with 2 cores and 4 GB of memory; some seconds a trial.
Expected result: twelve complete trials, a report with a Pareto front. Runs this short say nothing
about attention.
"""

from msa_jax.train.sweep import Choice, Objective, Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return Sweep(
        config="configs/quickstart.py",
        overrides={
            "model.d_model": 32,
            "model.num_layers": 1,  # a trial is mostly compilation
            "model.ffn_dim": 64,
            "attention.num_heads": 2,
            "attention.head_dim": 16,
            "attention.rope_dim": 8,
            "attention.index_dim": 8,
            "moe.num_experts": 0,
            "data.sequence_length": 128,
            "train.steps": 20,
            "train.log_every": 5,
            "train.eval_every": 0,
            "train.eval_batches": 2,
            "train.checkpoint_every": 5,
            "optimizer.warmup_steps": 4,
            "objective.index_warmup_steps": 0,
        },
        parameters=(
            Choice("attention.top_k", (2, 3, 4)),
            Choice("attention.block_size", (8, 16)),
            Choice("objective.kl_weight", (0.3, 3.0)),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
            Objective("attention_flops", "minimize"),
        ),
    )
