"""The texts that a model is evaluated on: one stream of tokens, cut into windows of any length."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from msa_jax.config import ConfigError
from msa_jax.data.corpus import Corpus, find_files, open_corpus
from msa_jax.data.haystack import Haystack
from msa_jax.data.tokenizer import Tokenizer
from msa_jax.train.config import DataConfig

VALIDATION = "validation"

# The longest of so many times the wanted bytes: few windows then hold the end of a document.
_CHOICE = 16
# No document is more than such a part of a stream.
_DOCUMENTS = 8
# More than a tokenizer's token is long, on average.
_BYTES_PER_TOKEN = 6
# A haystack's pieces are lines, and parts of those that are longer.
_PIECE = 100


@dataclasses.dataclass(frozen=True)
class TextStream:
    """Documents joined end to end, the same tokens for every model with the same tokenizer.

    Attributes:
      name: "validation", or the glob of the files.
      tokens: [N + 1] ids; each document begins with a separator where there is one.
    """

    name: str
    tokens: np.ndarray

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [W, length] and targets [W, length]; what fills no window is left out."""
        count = (len(self.tokens) - 1) // length
        cut = count * length
        return (
            self.tokens[:cut].reshape(count, length),
            self.tokens[1 : cut + 1].reshape(count, length),
        )


def open_text(config: DataConfig, name: str) -> Corpus:
    """The held-out part of a run's corpus for "validation", or all files of a glob.

    Raises:
      ConfigError: there is no such text.
    """
    if name == VALIDATION:
        if config.source == "retrieval":
            raise ConfigError(
                'data.source="retrieval" has no held-out text: name files, --text=GLOB'
            )
        return open_corpus(config)[1]
    label = f"--text={name}"
    try:
        files, _ = find_files(dataclasses.replace(config, source="files", files=name))
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"data.files={name!r}", label)) from None
    return Corpus(files, text_field=config.text_field, label=label)


def read_stream(
    config: DataConfig, tokenizer: Tokenizer, name: str, *, num_tokens: int
) -> TextStream:
    """`num_tokens` of a text, or all there are: the beginnings of long documents.

    No document gives more than an eighth, so that at least eight speak for the text, or as little
    more as it takes where there are not so many.

    Raises:
      ConfigError: there is no text, or it cannot be read.
    """
    documents = _long_documents(config, name, num_tokens * _BYTES_PER_TOKEN)
    parts = _DOCUMENTS
    tokens = _join(documents, tokenizer, num_tokens, -(-num_tokens // parts))
    while len(tokens) <= num_tokens and parts > 1:
        parts //= 2
        tokens = _join(documents, tokenizer, num_tokens, -(-num_tokens // parts))
    return TextStream(name, tokens)


def _join(
    documents: Sequence[str], tokenizer: Tokenizer, num_tokens: int, limit: int
) -> np.ndarray:
    """Up to `num_tokens` + 1 ids, the first `limit` of each document; of the last one more."""
    separator = [] if tokenizer.separator_id is None else [tokenizer.separator_id]
    parts, count = [], 0
    for document in documents:
        ids = np.asarray([*separator, *tokenizer.encode(document)], np.int32)
        left = num_tokens - count
        parts.append(ids[: left + 1 if left <= limit else limit])
        count += len(parts[-1])
        if count > num_tokens:
            break
    return np.concatenate(parts)


def read_haystack(
    config: DataConfig, measure: Callable[[str], int], name: str, *, num_bytes: int
) -> Haystack:
    """Lines of a text to hide needles in, in their order.

    Raises:
      ConfigError: there is no text, or it cannot be read.
    """
    pieces, size = [], 0
    for document in _long_documents(config, name, num_bytes):
        for line in document.splitlines(keepends=True):
            pieces += [line[i : i + _PIECE] for i in range(0, len(line), _PIECE)]
        size += len(document)
        if size >= num_bytes:
            break
    return Haystack(pieces, measure, in_order=True)


def _long_documents(config: DataConfig, name: str, num_bytes: int) -> Sequence[str]:
    """Documents of a sample of the text, the longest first; in an order that `data.seed` draws."""
    corpus = open_text(config, name)
    found, size = [], 0
    for chunk in np.random.default_rng(config.seed).permutation(len(corpus)):
        for document in corpus[int(chunk)]:
            if document:
                found.append(document)
                size += len(document)
        if size >= _CHOICE * num_bytes:
            break
    if not found:
        raise ConfigError(f"--text={name}: the files hold no text; name others")
    return sorted(found, key=len, reverse=True)  # stable: by the drawn order where equal
