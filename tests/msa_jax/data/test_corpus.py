"""Corpora: every record read once, a stable split by file, and errors that name the field."""

import json
import pathlib
import sys

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from msa_jax.config import ConfigError
from msa_jax.data import corpus as corpus_module
from msa_jax.data.corpus import (
    Corpus,
    CorpusFile,
    corpus_digest,
    find_files,
    open_corpus,
    split_files,
)
from msa_jax.train.config import DataConfig


def read_all(config):
    """All documents, of both parts together and sorted."""
    return sorted(text for part in open_corpus(config) for chunk in part for text in chunk)


def write_files(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content)
    return DataConfig(source="files", files=str(folder / "*.txt"))


def json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_stdlib_is_the_same_library_on_every_machine():
    files, _ = find_files(DataConfig())
    names = [file.name for file in files]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "idle_test"}
    assert not [name for name in names if "_sysconfigdata" in name]


def test_stdlib_parts_are_disjoint_and_complete():
    files, _ = find_files(DataConfig())
    training, validation = open_corpus(DataConfig())
    names = [{file.name for file in part.files} for part in (training, validation)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {file.name for file in files}
    assert 0.01 < len(names[1]) / len(files) < 0.12


def test_text_files_are_documents_as_they_are(tmp_path):
    config = write_files(tmp_path, a=b"one\r\n", b="zw\u00f6lf\n".encode(), c=b"")
    assert read_all(config) == ["", "one\r\n", "zw\u00f6lf\n"]


def test_nested_glob_names_are_relative_to_its_fixed_part(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(name)
    files, _ = find_files(DataConfig(source="files", files=f"{tmp_path}/**/*.txt"))
    assert [file.name for file in files] == ["a.txt", "deep/b.txt", "deep/er/c.txt"]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    texts=st.lists(st.text(max_size=60), max_size=12),
    chunk=st.integers(1, 80),
    line_feed=st.booleans(),
    blank=st.sampled_from(["", "\n", " \n\n"]),
)
# A record of 13 bytes: a chunk that ends with it, and one that holds it and a byte more.
@hypothesis.example(texts=["", "", ""], chunk=13, line_feed=True, blank="")
@hypothesis.example(texts=["", "", ""], chunk=14, line_feed=True, blank="")
def test_json_lines_chunks_give_every_record_once(tmp_path_factory, texts, chunk, line_feed, blank):
    path = tmp_path_factory.mktemp("corpus") / "records.jsonl"
    lines = blank.join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text(lines if line_feed else lines.removesuffix("\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "JSON_LINES_CHUNK", chunk)
        file = CorpusFile(path.name, path, path.stat().st_size)
        corpus = Corpus([file], label="corpus")
        assert [text for index in range(len(corpus)) for text in corpus[index]] == texts
        assert len(corpus) == -(-file.size // chunk)


def test_parquet_row_groups_are_chunks(tmp_path):
    for name in "ab":
        texts = [f"{name}{number}" for number in range(5)]
        table = pyarrow.table({"number": list(range(5)), "body": texts})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    config = DataConfig(source="files", files=str(tmp_path / "*.parquet"), text_field="body")
    assert [list(part) for part in open_corpus(config)] in (
        [[["a0", "a1"], ["a2", "a3"], ["a4"]], [["b0", "b1"], ["b2", "b3"], ["b4"]]],
        [[["b0", "b1"], ["b2", "b3"], ["b4"]], [["a0", "a1"], ["a2", "a3"], ["a4"]]],
    )


def test_several_files_are_indexed_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines({"text": "1"}, {"text": "2"}))
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.txt").write_text("3")
    files, label = find_files(DataConfig(source="files", files=str(tmp_path / "*")))
    corpus = Corpus(files, label=label)
    assert list(corpus) == [["1", "2"], ["3"]]
    with pytest.raises(IndexError):
        corpus[-1]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    names=st.lists(st.text("abc/", min_size=1, max_size=6), min_size=2, unique=True),
    more=st.lists(st.text("def/", min_size=1, max_size=6), unique=True),
    fraction=st.floats(0.001, 0.999),
)
def test_split_is_disjoint_complete_and_by_name_alone(names, more, fraction):
    def split(names):
        files = [CorpusFile(name, pathlib.Path(name), 1) for name in names]
        return [{file.name for file in part} for part in split_files(files, fraction)]

    training, validation = split(names)
    assert training
    assert validation
    assert not training & validation
    assert training | validation == set(names)
    # A file changes its part only if it was what kept a part from being empty.
    larger = split(names + more)
    moved = (training & larger[1]) | (validation & larger[0])
    assert len(moved) <= 1


def test_split_is_the_same_on_every_machine():
    names = [f"{number}.txt" for number in range(1000)]
    files = [CorpusFile(name, pathlib.Path(name), 1) for name in names]
    validation = split_files(files, 0.1)[1]
    assert len(validation) == 90
    assert [file.name for file in validation[:4]] == ["14.txt", "48.txt", "68.txt", "71.txt"]


def test_digest_sees_a_changed_file(tmp_path):
    config = write_files(tmp_path, a=b"one", b=b"two")
    before = corpus_digest(open_corpus(config))
    assert corpus_digest(open_corpus(config)) == before
    (tmp_path / "a.txt").write_bytes(b"three")
    assert corpus_digest(open_corpus(config)) != before


def test_glob_without_a_match_is_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    config = DataConfig(source="files", files=str(tmp_path / "*.txt"))
    with pytest.raises(ConfigError, match=r"data\.files='.*\*\.txt': matches no file"):
        open_corpus(config)


def test_unreadable_file_is_refused(tmp_path):
    config = write_files(tmp_path, a=b"one", b=b"two")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.files=.*c\.txt cannot be read"):
        open_corpus(config)


def test_file_that_goes_away_is_refused(tmp_path):
    training, _ = open_corpus(write_files(tmp_path, a=b"one", b=b"two"))
    training.files[0].path.unlink()
    with pytest.raises(ConfigError, match=r"data\.files=.*cannot be read \(No such file"):
        training[0]


def test_text_that_is_not_utf8_is_refused(tmp_path):
    config = write_files(tmp_path, a=b"caf\xe9", b=b"caf\xe9")
    with pytest.raises(ConfigError, match=r"data\.files=.*is not UTF-8 text at byte 3; convert"):
        open_corpus(config)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (json_lines({"body": "x", "id": 1}), "data.text_field='text'; its fields are body, id"),
        (json_lines({"text": None}), "has no text in the field data.text_field='text'"),
        (json_lines({"text": "fine"}) + "{oops\n", "at byte 17 is not JSON"),
        (json_lines([1]), "is not a JSON object"),
    ],
)
def test_record_without_text_is_refused(tmp_path, line, problem):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(line)
    config = DataConfig(source="files", files=str(tmp_path / "*.jsonl"))
    with pytest.raises(ConfigError) as raised:
        read_all(config)
    assert str(raised.value).startswith("data.files=")
    assert problem in str(raised.value)


def test_parquet_without_the_field_is_refused(tmp_path):
    for name in "ab":
        table = pyarrow.table({"body": ["x"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    config = DataConfig(source="files", files=str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match=r"data\.text_field='text'; its fields are body"):
        open_corpus(config)


def test_broken_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    config = DataConfig(source="files", files=str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match=r"data\.files=.*a\.parquet cannot be read"):
        open_corpus(config)


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    config = DataConfig(source="files", files=str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match=r"data\.files=.*msa-jax\[parquet\]"):
        open_corpus(config)


@pytest.mark.parametrize("contents", [{"a": b"one"}, {"a": b"", "b": b""}])
def test_part_without_text_is_refused(tmp_path, contents):
    with pytest.raises(ConfigError, match=r"data\.files=.*part .* has no text; give more files"):
        open_corpus(write_files(tmp_path, **contents))
