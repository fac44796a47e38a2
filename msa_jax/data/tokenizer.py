"""Tokenizers: text to int32 ids and back.

A tokenizer may have a separator id, which stands before the first token of every document and is
the target of its last one. So the model predicts every token of a document, its end included, and
generation can stop there. A prompt must start as the documents did: use `encode_prompt`.
"""

import json
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from msa_jax.config import ConfigError

# What a `tokenizer.json` calls its end of document when no `tokenizer_config.json` says it.
SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline and generation need of a tokenizer.

    Attributes:
      vocab_size: all ids are below it.
      separator_id: the id between documents, or None where the tokenizer has none.
    """

    vocab_size: int
    separator_id: int | None

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] of `text`, int32, without separators; text never encodes to one."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` [n], without the separators among them."""
        ...

    def num_bytes(self, ids: ArrayLike) -> int:
        """Length of the text of `ids` [n] in UTF-8 bytes, for losses per byte."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids, so the vocabulary is 256 and a token is a byte.

    The separator is 255, a byte that UTF-8 never uses. An id of its own (256) would make the
    vocabulary 257, a prime that no mesh axis divides.
    """

    vocab_size: int = 256
    separator_id: int | None = 255

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes [n] of `text` as int32; a lone surrogate, which has none, becomes "?"."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` [n], without separators; bytes that are no UTF-8 become U+FFFD."""
        return bytes(_without(ids, self.separator_id)).decode("utf-8", errors="replace")

    def num_bytes(self, ids: ArrayLike) -> int:
        """Ids that are not separators."""
        return len(_without(ids, self.separator_id))


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, read by the optional `tokenizers` package.

    The separator is the `eos_token` of the `tokenizer_config.json` beside it, or else the first of
    `SEPARATOR_NAMES` in the vocabulary, or else None.

    Args:
      path: of the `tokenizer.json`.

    Raises:
      ConfigError: the package is missing, or the file cannot be read.
    """

    vocab_size: int
    separator_id: int | None

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                f"data.tokenizer={path!r}: needs the package tokenizers: "
                'pip install "msa-jax[tokenizers]", or take "byte"'
            ) from None
        try:
            # A file that is not JSON of this kind makes the Rust reader raise a bare Exception.
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
            name = _end_of_document(pathlib.Path(path).with_name("tokenizer_config.json"))
        except Exception as error:
            raise ConfigError(
                f'data.tokenizer={path!r}: give "byte" or the path of a readable tokenizer.json '
                f"({error})"
            ) from None
        # The file may ask for truncation or padding, and for special tokens wherever the text
        # spells one: documents are to come out whole and as they are.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        names = SEPARATOR_NAMES if name is None else (name,)
        self.separator_id = next((vocabulary[name] for name in names if name in vocabulary), None)

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] of `text`, int32; special tokens spelt in the text are ordinary text."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` [n], without separators and other special tokens."""
        return self._tokenizer.decode(_without(ids, self.separator_id), skip_special_tokens=True)

    def num_bytes(self, ids: ArrayLike) -> int:
        """Bytes of the decoded text."""
        return len(self.decode(ids).encode("utf-8"))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `DataConfig.tokenizer`: "byte", or the path of a `tokenizer.json`.

    Raises:
      ConfigError: the path cannot be read, or the package it needs is missing.
    """
    return ByteTokenizer() if name == "byte" else HuggingFaceTokenizer(name)


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids [n] of a prompt, int32: a separator, where there is one, then `text`."""
    ids = tokenizer.encode(text)
    if tokenizer.separator_id is None:
        return ids
    return np.insert(ids, 0, tokenizer.separator_id)


def _without(ids: ArrayLike, separator_id: int | None) -> list[int]:
    return [token for token in np.asarray(ids).tolist() if token != separator_id]


def _end_of_document(path: pathlib.Path) -> str | None:
    """The `eos_token` of a `tokenizer_config.json`: a string or an object with its content."""
    if not path.is_file():
        return None
    token: Any = json.loads(path.read_text("utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token
