"""The data pipeline: from a `DataConfig` to batches, deterministic and checkpointable.

    chunks, shuffled anew every epoch -> documents -> token ids -> packed rows, shuffled in a pool
    -> (mixed with rows of synthetic documents) -> batches

All of it is grain, so a state is a few numbers: where the stream stood when the current pool of
rows began, and how many of its rows were given out. Restoring packs that pool again.

With several processes each packs the same stream and keeps its own rows of every batch. That spends
some host time to buy a state that is the same on all of them, and batches that do not depend on how
many there are.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental

from msa_jax.config import ConfigError, require
from msa_jax.data import packing, retrieval
from msa_jax.data.corpus import Corpus, corpus_digest, open_corpus
from msa_jax.data.packing import Batch
from msa_jax.data.tokenizer import Tokenizer, load_tokenizer
from msa_jax.train.config import DataConfig

# Reading in the thread that packs, which is far faster than most models.
_READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Synthetic documents are drawn as they are asked for; no run gets to the end of them.
_ENDLESS = 2**62


class TrainIterator(Iterator[Batch]):
    """Endless training batches, whose position can be saved and restored exactly.

    Args:
      batches: grain's iterator.
      digest: of the corpus that it reads.
    """

    def __init__(self, batches: grain.DatasetIterator, digest: str):
        self._batches = batches
        self._digest = digest

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position, small and of plain JSON values."""
        return {"corpus": self._digest, "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from `get_state` of an iterator of the same configuration.

        Raises:
          ConfigError: files came, went or changed their size since: the rows would be others.
        """
        if state["corpus"] != self._digest:
            raise ConfigError(
                "data: the corpus is not the one of the saved state (files came, went or changed "
                "their size), so the run cannot go on where it stood; restore the files, or start "
                "a new run"
            )
        self._batches.set_state(_with_tuples(state["position"]))

    def close(self) -> None:
        """Ends the thread that packs ahead, if there is one; no batch can be had after it."""
        self._batches.close()


def train_iterator(
    config: DataConfig,
    *,
    block_size: int,
    prefetch: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> TrainIterator:
    """Training batches without end, every epoch in another order.

    Args:
      config: what to read.
      block_size: documents start on multiples of it; divides `config.sequence_length`.
      prefetch: batches that a thread packs ahead, from the first one asked for; close the iterator
        to end it. 0 packs as asked.
      process_index: whose rows to give out; JAX's by default.
      process_count: among how many processes; JAX's by default.

    Returns:
      Batches of int32 arrays [config.batch_size / process_count, config.sequence_length].

    Raises:
      ConfigError: the corpus, the tokenizer or a field of `config` cannot be used.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    rows_of_process = _rows_of_process(config, process_index, process_count)
    documents, shares, corpora = [], [], ()
    if config.source != "retrieval" and config.retrieval_share < 1:
        corpora = open_corpus(config)
        documents.append(_documents(_source(corpora[0], config).repeat(), config.seed))
        shares.append(1 - config.retrieval_share)
    if config.source == "retrieval" or config.retrieval_share > 0:
        documents.append(_retrieval_documents(config, tokenizer, "train"))
        shares.append(config.retrieval_share or 1)
    parts = [_rows(part, config, tokenizer, block_size) for part in documents]
    rows = parts[0] if len(parts) == 1 else grain.IterDataset.mix(parts, shares)
    batches = rows.batch(config.batch_size).map(rows_of_process)
    if prefetch:
        batches = grain_experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=prefetch
        )
    return TrainIterator(iter(batches), corpus_digest(corpora))


def validation_batches(
    config: DataConfig,
    *,
    block_size: int,
    num_batches: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Batch]:
    """The same validation batches at every call: a sample of the held-out files, in fixed order.

    Synthetic documents are not mixed in; `source="retrieval"` has a validation stream of its own.

    Args:
      config: what to read.
      block_size: as for `train_iterator`.
      num_batches: at most so many. A smaller validation part ends sooner, each of its tokens given
        out once; its last batch is filled up with rows of padding, so weigh means by `loss_mask`.
      process_index: as for `train_iterator`.
      process_count: as for `train_iterator`.

    Returns:
      Batches as from `train_iterator`.

    Raises:
      ConfigError: as from `train_iterator`, at the call.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    rows_of_process = _rows_of_process(config, process_index, process_count)
    if config.source == "retrieval":
        documents = _retrieval_documents(config, tokenizer, "validation")
    else:
        documents = _documents(_source(open_corpus(config)[1], config), config.seed)
    fill = functools.partial(grain_experimental.batch_and_pad, batch_size=config.batch_size)
    rows = _rows(documents, config, tokenizer, block_size)
    batches = rows.batch(config.batch_size, batch_fn=fill).map(rows_of_process)
    return itertools.islice(iter(batches), num_batches)


def vocab_size(config: DataConfig) -> int:
    """The `model.vocab_size` that the tokenizer of `config` needs."""
    return load_tokenizer(config.tokenizer).vocab_size


def _source(corpus: Corpus, config: DataConfig) -> grain.MapDataset:
    return grain.MapDataset.source(corpus).shuffle(seed=config.seed)


def _with_tuples(state: Any) -> Any:
    """A state as it was before JSON made lists of the slices that grain compares with tuples."""
    if isinstance(state, list):  # of the parts of a mixture
        return [_with_tuples(part) for part in state]
    if not isinstance(state, dict):
        return state
    slices = state.get("remainder_slices", {})
    state = {key: _with_tuples(value) for key, value in state.items()}
    if slices:
        state["remainder_slices"] = {name: tuple(ends) for name, ends in slices.items()}
    return state


def _documents(chunks: grain.MapDataset, seed: int) -> grain.IterDataset:
    """The documents of each chunk, in an order drawn anew every epoch."""
    shuffled = chunks.random_map(_permute, seed=seed)
    return grain_experimental.FlatMapIterDataset(
        shuffled.to_iter_dataset(_READ_OPTIONS), _Flatten()
    )


def _permute(chunk: list[str], rng: np.random.Generator) -> list[str]:
    return [chunk[index] for index in rng.permutation(len(chunk))]


class _Flatten(grain_experimental.FlatMapTransform):
    max_fan_out = sys.maxsize

    def flat_map(self, element: list[str]) -> Sequence[str]:
        return element


def _retrieval_documents(
    config: DataConfig, tokenizer: Tokenizer, split: retrieval.Split
) -> grain.IterDataset:
    """Synthetic documents of all lengths up to a row, with as many tokens in each octave of them.

    Long ones are what there is to learn; the many short ones are what it is learned from. Documents
    of many needles fill a row, as they have short distances and long ones in them.
    """
    longest = config.sequence_length - 1  # a separator goes before it
    shortest = retrieval.shortest_length(config.retrieval_task)
    require(
        shortest <= longest,
        "data.sequence_length",
        config.sequence_length,
        f"must be at least {shortest + 1} to hold a {config.retrieval_task} document",
    )

    def measure(text: str) -> int:
        return len(tokenizer.encode(text))

    def document(index: int) -> str:
        place: Any = {"seed": config.seed, "index": index, "split": split}
        task = retrieval.task_of(config.retrieval_task, **place)
        shortest = retrieval.shortest_length(task)
        draw = np.random.default_rng((config.seed, index)).random()
        length = int(1 / (1 / shortest - draw * (1 / shortest - 1 / longest)))
        length = longest if task == "many_needles" else length
        return retrieval.retrieval_example(task, length=length, measure=measure, **place).document

    return grain.MapDataset.range(_ENDLESS).map(document).to_iter_dataset(_READ_OPTIONS)


def _rows(
    documents: grain.IterDataset, config: DataConfig, tokenizer: Tokenizer, block_size: int
) -> grain.IterDataset:
    options = {
        "sequence_length": config.sequence_length,
        "separator_id": tokenizer.separator_id,
        "seed": config.seed,
    }
    encoded = documents.map(tokenizer.encode)
    if config.join_documents:
        return packing.join_documents(encoded, **options)
    return packing.pack_documents(encoded, block_size=block_size, **options)


def _rows_of_process(
    config: DataConfig, process_index: int | None, process_count: int | None
) -> Callable[[Batch], Batch]:
    """What cuts a process's rows out of a global batch; also checks what grain would refuse."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    rows = config.batch_size // count
    require(
        config.batch_size % count == 0,
        "data.batch_size",
        config.batch_size,
        f"must be a multiple of the number of processes, {count}",
    )
    require(0 <= config.seed < 2**32, "data.seed", config.seed, "must be between 0 and 2**32 - 1")
    return lambda batch: {
        key: array[index * rows : (index + 1) * rows] for key, array in batch.items()
    }
