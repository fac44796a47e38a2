"""One case in a process of its own: `python -m experiments.benchmarking.worker '<case as JSON>'`.

jax takes the GPU's memory for the life of a process, a hang must not take the rest along, and peak
memory is a process's. Prints one line of JSON behind `MARK` for each record.
"""

import json
import sys
from collections.abc import Sequence

from experiments.benchmarking import jax_worker, msa_worker, torch_worker, training_worker
from experiments.benchmarking.cases import MARK, TRAINING, Case
from experiments.benchmarking.jax_worker import describe

# The baselines look at the case's passes themselves.
SUBJECTS = {
    "ceilings": jax_worker.ceilings,
    "msa": msa_worker.msa,
    "cudnn": jax_worker.cudnn,
    "flash_attention_4": torch_worker.flash_attention_4,
    "flash_msa": torch_worker.flash_msa,
}


def main(argv: Sequence[str]) -> int:
    """Runs the case named by the only argument."""
    case = Case.from_json(json.loads(argv[1]))
    try:
        training = case.subject == "msa" and case.passes == TRAINING
        run = training_worker.msa_training if training else SUBJECTS[case.subject]
        for record in run(case):
            print(MARK + json.dumps(record), flush=True)
    except Exception as error:  # whatever the libraries raise becomes the case's record
        print(MARK + json.dumps({"error": describe(error)}), flush=True)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
