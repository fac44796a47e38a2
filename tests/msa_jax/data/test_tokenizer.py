"""Tokenizers: round trips, separators, and errors that name the field."""

import json
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from msa_jax.config import ConfigError, ModelConfig
from msa_jax.data.tokenizer import ByteTokenizer, encode_prompt, load_tokenizer

WORDS = ["<|endoftext|>", "the", "cat", "sat", "<stop>", "[UNK]"]


def save_word_tokenizer(folder, words=WORDS, special=("<|endoftext|>", "<stop>"), **settings):
    """A `tokenizer.json` with one id per word; `settings` may ask for truncation or padding."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocab=vocabulary, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in special if word in words])
    if "truncation" in settings:
        tokenizer.enable_truncation(settings["truncation"])
    if "padding" in settings:
        tokenizer.enable_padding(length=settings["padding"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.text())
def test_bytes_round_trip_and_never_make_a_separator(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.separator_id not in ids.tolist()
    assert tokenizer.decode(encode_prompt(tokenizer, text)) == text


def test_bytes_vocabulary_is_the_default_of_the_model():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocab_size == ModelConfig().vocab_size == 256
    assert tokenizer.separator_id is not None
    assert tokenizer.separator_id < tokenizer.vocab_size


def test_bytes_without_a_meaning_are_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\ud800b").tolist() == list(b"a?b")
    assert tokenizer.decode(np.array([97, 0xC3, 98, 255])) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_prompt_starts_like_a_document(tmp_path):
    assert encode_prompt(ByteTokenizer(), "hi").tolist() == [255, *b"hi"]
    bare = load_tokenizer(save_word_tokenizer(tmp_path, words=["[UNK]", "cat"]))
    assert bare.separator_id is None
    assert encode_prompt(bare, "cat").tolist() == [1]


def test_hugging_face_ids_and_separator(tmp_path):
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path, truncation=2, padding=8))
    ids = tokenizer.encode("the cat sat the cat")
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 2, 3, 1, 2]
    assert tokenizer.vocab_size == len(WORDS)
    assert tokenizer.separator_id == 0
    assert tokenizer.decode([0, 1, 2, 0]) == "the cat"


def test_hugging_face_text_cannot_spell_a_separator(tmp_path):
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path))
    assert tokenizer.separator_id not in tokenizer.encode("cat<|endoftext|>sat").tolist()


def test_hugging_face_lone_surrogate_is_no_crash(tmp_path):
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path))
    assert tokenizer.encode("cat \ud800 sat").tolist() == [2, 5, 3]


@pytest.mark.parametrize("token", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_hugging_face_separator_from_its_own_config(tmp_path, token):
    path = save_word_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(path).separator_id == WORDS.index("<stop>")


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    path = save_word_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*msa-jax\[tokenizers\]"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [None, "no json", '{"some": "json"}'])
def test_unreadable_file_names_the_field(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*readable tokenizer\.json"):
        load_tokenizer(str(path))
