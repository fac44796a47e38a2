"""A finished run as the long-context evaluation sees it."""

import dataclasses
import functools
import os

from msa_jax.data.haystack import Haystack, filler_haystack
from msa_jax.data.tokenizer import Tokenizer, load_tokenizer
from msa_jax.eval.long_context import LongContextConfig
from msa_jax.eval.texts import VALIDATION, TextStream, read_haystack, read_stream
from msa_jax.model import Transformer
from msa_jax.train.checkpoint import checkpoint_steps
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.initialize import load_model

# Haystacks are drawn from so many bytes per token of the longest prompt.
_HAYSTACK_BYTES = 8


class CannotMeasure(ValueError):
    """A cell that makes no sense for this model, text or length; the message says why."""


@dataclasses.dataclass(eq=False)
class Subject:
    """The model of a checkpoint and what it is evaluated on.

    Attributes:
      model: on one device.
      run: the run's config.
      tokenizer: the run's.
      settings: of the evaluation.
      step: of the checkpoint.
      earlier_step: of the checkpoint before it; None where the run has kept no other.
      workdir: of the run.
    """

    model: Transformer
    run: ExperimentConfig
    tokenizer: Tokenizer
    settings: LongContextConfig
    step: int
    earlier_step: int | None
    workdir: str

    @functools.cached_property
    def earlier_model(self) -> Transformer | None:
        """The model of the checkpoint before."""
        if self.earlier_step is None:
            return None
        return load_model(self.workdir, step=self.earlier_step)[0]

    @functools.cache  # noqa: B019 - a subject lives as long as its process
    def stream(self, name: str) -> TextStream:
        """A text as tokens; see `read_stream`.

        Raises:
          CannotMeasure: the run was trained on synthetic documents alone, which are no text.
        """
        if name == VALIDATION and self.run.data.source == "retrieval":
            raise CannotMeasure("the run's data is synthetic; --text=GLOB names a text")
        return read_stream(self.run.data, self.tokenizer, name, num_tokens=self.settings.tokens)

    @functools.cached_property
    def haystack(self) -> Haystack:
        """What needles are hidden in, measured in tokens."""
        if self.settings.haystack == "filler":
            return filler_haystack(self.count_tokens)
        num_bytes = _HAYSTACK_BYTES * max(self.settings.lengths)
        return read_haystack(self.run.data, self.count_tokens, VALIDATION, num_bytes=num_bytes)

    def count_tokens(self, text: str) -> int:
        """The length of a text in tokens, without a separator."""
        return len(self.tokenizer.encode(text))


def load_subject(
    workdir: str | os.PathLike[str], settings: LongContextConfig, *, step: int | None = None
) -> Subject:
    """Loads a run's checkpoint, by default the latest.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: the run's tokenizer cannot be loaded.
    """
    model, run = load_model(workdir, step=step)
    steps = checkpoint_steps(workdir)
    step = steps[-1] if step is None else step
    earlier = [other for other in steps if other < step]
    return Subject(
        model=model,
        run=run,
        tokenizer=load_tokenizer(run.data.tokenizer),
        settings=settings,
        step=step,
        earlier_step=earlier[-1] if earlier else None,
        workdir=os.fspath(workdir),
    )
