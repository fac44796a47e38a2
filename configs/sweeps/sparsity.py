"""How sparse, and how the index branch learns: what quality costs in attention FLOPs.

    python -m experiments.sweep --sweep=configs/sweeps/sparsity.py --workdir=runs/sweeps/sparsity

searches (TPE); the text after a colon takes another sampler: `sparsity.py:nsga2`, `:random`, or
`:grid`, every combination. Any base model can be made larger with `--config.field=value`.

Hardware: any machine with 2 cores and 4 GB of memory, with as many as there are to share the
trials (docs/sweeps.md). A trial is one MSA training of `make quickstart`.
Expected result: a Pareto front of validation loss and score recall against attention FLOPs, on
which learned selections stand before fixed ones.
"""

from msa_jax.train.config import ExperimentConfig
from msa_jax.train.sweep import Choice, Condition, Objective, SamplerName, Sweep

_INDEX_DIMS = (8, 16, 32)
_KL_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)


def get_sweep(sampler: SamplerName = "tpe") -> Sweep:
    """The sweep; `sampler` "grid" tries every combination, the others 120 points.

    About half of the points are left out before training, see the conditions.
    """
    return Sweep(
        config="configs/quickstart.py",
        parameters=(
            Choice("attention.top_k", (2, 4, 8, 16)),
            Choice("attention.block_size", (8, 16, 32, 64)),
            Choice("attention.index_dim", _INDEX_DIMS),
            Choice("objective.kl_weight", _KL_WEIGHTS),
            Choice("objective.index_warmup_steps", (0, 40, 80, 160)),
            Choice("attention.selector", ("learned", "strided", "random", "sink_window")),
        ),
        objectives=(
            Objective("validation_loss", "minimize"),
            Objective("score_recall", "maximize"),
            Objective("attention_flops", "minimize"),
        ),
        sampler=sampler,
        trials=None if sampler == "grid" else 120,
        conditions=(
            Condition("top_k blocks hold the whole row: nothing is selected", _is_dense),
            Condition(
                "a fixed selector has no index branch: one index_dim and kl_weight are enough",
                _repeats_a_fixed_selector,
            ),
        ),
    )


def _is_dense(config: ExperimentConfig) -> bool:
    kept = config.attention.top_k * config.attention.block_size
    return kept >= config.data.sequence_length


def _repeats_a_fixed_selector(config: ExperimentConfig) -> bool:
    fixed = not config.attention.learns_selection
    first = (_INDEX_DIMS[0], _KL_WEIGHTS[0])
    return fixed and (config.attention.index_dim, config.objective.kl_weight) != first
