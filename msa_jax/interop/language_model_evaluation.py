"""A finished run as a model of lm-eval, EleutherAI's evaluation harness (extra `eval`).

Example:
    import lm_eval
    from msa_jax.interop.language_model_evaluation import RunLM

    lm_eval.simple_evaluate(model=RunLM("runs/quickstart/msa"), tasks=["lambada_openai"])
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        'msa_jax.interop.language_model_evaluation needs lm-eval: pip install "msa-jax[eval]"'
    ) from error

from msa_jax.config import ConfigError
from msa_jax.data.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from msa_jax.decoding import generate
from msa_jax.eval.scoring import score_tokens
from msa_jax.train.initialize import load_model

# Rows are padded to powers of two from here on, so that few programs are compiled.
_SHORTEST = 64
_NEW_TOKENS = 256


class _Row(NamedTuple):
    """A row to score: what the model reads, and the targets of its last tokens."""

    tokens: Sequence[int]
    targets: Sequence[int]


class RunLM(LM):
    """The model of a run's checkpoint, on one device.

    Every text begins behind the tokenizer's separator, as documents did in training. Generation is
    greedy.

    Args:
      workdir: the run's folder.
      step: which checkpoint, None for the latest.
      max_length: most tokens of context; the training length by default. A longer context loses its
        beginning, a longer document is scored in windows.
      batch_tokens: tokens of a batch, padding included.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: the tokenizer cannot be loaded or has no separator, or a number is below 1.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        step: int | None = None,
        max_length: int | None = None,
        batch_tokens: int = 16_384,
    ):
        super().__init__()
        self.model, config = load_model(workdir, step=step)
        self.run_tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        self.max_length = config.data.sequence_length if max_length is None else max_length
        self.batch_tokens = batch_tokens
        for name in ("max_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be >= 1")
        if self.run_tokenizer.separator_id is None:
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer!r}: has no separator, behind which a text "
                "could begin; name one in its tokenizer_config.json (eos_token)"
            )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, nats, and whether it is the greedy one."""
        rows = [self._continuation(*request.args) for request in requests]
        return self._score(rows)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each document, nats; windows of `max_length` that do not overlap."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.run_tokenizer.encode(request.args[0]).tolist(),
                prefix_token=self.run_tokenizer.separator_id or 0,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                context, targets = make_disjoint_window(window)
                rows.append(_Row((context + targets)[:-1], targets))
                owners.append(owner)
        sums = np.zeros(len(requests))
        for owner, (log_prob, _) in zip(owners, self._score(rows), strict=True):
            sums[owner] += log_prob
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first of its stop strings.

        Raises:
          ValueError: a request asks for sampling, or for more tokens than `max_length`.
        """
        return [self._generate(*request.args) for request in requests]

    def _continuation(self, context: str, continuation: str) -> _Row:
        """Tokens of both, split where the context's end; spaces between belong to what follows."""
        stripped = context.rstrip(" ")
        whole = encode_prompt(self.run_tokenizer, context + continuation).tolist()
        targets = whole[len(encode_prompt(self.run_tokenizer, stripped)) :]
        if len(targets) > self.max_length:
            raise ConfigError(
                f"max_length={self.max_length}: a continuation has {len(targets)} tokens; "
                "set it higher"
            )
        return _Row(whole[-self.max_length - 1 : -1], targets)

    def _score(self, rows: Sequence[_Row]) -> list[tuple[float, bool]]:
        """Log-probability of each row's targets, and whether all are greedy, in the rows' order."""
        by_width: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_width.setdefault(_padded(len(row.tokens)), []).append(index)
        found = {}
        for width, indices in by_width.items():
            size = max(1, self.batch_tokens // width)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                scores = self._score_batch([rows[index] for index in batch], size, width)
                found |= dict(zip(batch, scores, strict=True))
        return [found[index] for index in range(len(rows))]

    def _score_batch(
        self, rows: Sequence[_Row], size: int, width: int
    ) -> Iterator[tuple[float, bool]]:
        """Scores rows as a batch of one shape; padding stands behind, where nothing sees it."""
        tokens, targets = np.zeros((2, size, width), np.int32)
        asked = []
        for place, row in enumerate(rows):
            end = len(row.tokens)
            asked.append(np.s_[place, end - len(row.targets) : end])
            tokens[place, :end] = row.tokens
            targets[asked[-1]] = row.targets
        scores = score_tokens(self.model, tokens, targets)
        log_probs, greedy = np.asarray(scores.log_probs, np.float64), np.asarray(scores.greedy)
        for span in asked:
            yield float(log_probs[span].sum()), bool(greedy[span].all())

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature", 0):
            raise ValueError("generation_kwargs: only greedy decoding, temperature=0, is served")
        new = int(options.get("max_gen_toks", _NEW_TOKENS))
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks={new}: leaves no context of max_length={self.max_length}"
            )
        prompt = encode_prompt(self.run_tokenizer, context)[new - self.max_length :]
        padded = np.zeros((1, _padded(len(prompt))), np.int32)
        padded[0, : len(prompt)] = prompt
        tokens = generate(
            self.model,
            jnp.asarray(padded),
            prompt_lengths=jnp.array([len(prompt)], jnp.int32),
            max_new_tokens=new,
            stop_token=self.run_tokenizer.separator_id,
        )
        text = self.run_tokenizer.decode(np.asarray(tokens[0]))
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text


def _padded(length: int) -> int:
    """The next power of two."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())
