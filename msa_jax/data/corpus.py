"""Corpora: random access to the documents of many files, split by file.

A document is a text file, or a record of a `.jsonl` or `.parquet` file. The unit of access is a
*chunk* of neighbouring documents: a whole text file, about 64 KiB of a `.jsonl` file, a row group
of a `.parquet` file. Where chunks lie follows from the files' sizes alone, so opening a corpus
indexes nothing. Chunks are shuffled like documents; what a shuffle of chunks leaves together is a
few dozen short records, or one row group, which is also what has to fit in memory.
"""

import bisect
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import sysconfig
from collections.abc import Generator, Iterable, Sequence

from msa_jax.config import ConfigError
from msa_jax.train.config import DataConfig

JSON_LINES_CHUNK = 64 * 1024

# Not part of the standard library, or not the same on every machine: installed packages, tests
# (many distributions ship Python without them; some are broken source on purpose), and what the
# build wrote about itself.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
      name: path relative to the corpus, with "/": the same wherever the corpus lies.
      path: where it lies.
      size: bytes.
    """

    name: str
    path: pathlib.Path
    size: int


class Corpus:
    """A sequence of chunks: `corpus[i]` reads chunk i, a list of documents (str).

    Args:
      files: read in this order.
      text_field: which field of a record holds the text.
      label: what errors call the corpus, such as `data.files='notes/*.txt'`.

    Raises:
      ConfigError: a file cannot be read or decoded, or a record has no text; mostly on access.
    """

    def __init__(self, files: Sequence[CorpusFile], *, text_field: str = "text", label: str):
        self.files = tuple(files)
        self._text_field = text_field
        self._label = label
        # _ends[n] is how many chunks files 0..n have together.
        self._ends = list(itertools.accumulate(self._count_chunks(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> list[str]:
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of a corpus of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        file = self.files[number]
        chunk = index - (self._ends[number - 1] if number else 0)
        with self._reading(file.path):
            if file.path.suffix == ".parquet":
                return self._read_parquet(file.path, chunk)
            if file.path.suffix == ".jsonl":
                return self._read_json_lines(file.path, chunk)
            return [self._decode(file.path.read_bytes(), file.path)]

    def has_text(self) -> bool:
        """Whether any document has any text; reads no further than the first that has."""
        return any(document for chunk in self for document in chunk)

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._label}: {problem}")

    @contextlib.contextmanager
    def _reading(self, path: pathlib.Path) -> Generator[None]:
        """Turns what reading can raise into one error; Arrow's own errors are ValueErrors."""
        try:
            yield
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._error(f"{path} cannot be read ({reason})") from None

    def _count_chunks(self, file: CorpusFile) -> int:
        if file.path.suffix == ".parquet":
            with self._reading(file.path), self._open_parquet(file.path) as parquet:
                return parquet.metadata.num_row_groups
        if file.path.suffix == ".jsonl":
            return -(-file.size // JSON_LINES_CHUNK)
        return 1

    def _decode(self, data: bytes, where: object) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(
                f"{where} is not UTF-8 text at byte {error.start}; convert it, "
                "or leave it out of the corpus"
            ) from None

    def _read_json_lines(self, path: pathlib.Path, chunk: int) -> list[str]:
        """The records whose first byte lies in the chunk; the last one may reach beyond it."""
        position, stop = chunk * JSON_LINES_CHUNK, (chunk + 1) * JSON_LINES_CHUNK
        documents = []
        with path.open("rb") as file:
            if position > 0:
                # The line through the byte before the chunk belongs to an earlier chunk, even if
                # that byte is its line feed. If it fills this chunk no record starts here.
                file.seek(position - 1)
                position += len(file.readline(JSON_LINES_CHUNK + 1)) - 1
            while position < stop and (line := file.readline()):
                if line.strip():
                    documents.append(self._text_of_line(line, f"{path} at byte {position}"))
                position += len(line)
        return documents

    def _text_of_line(self, line: bytes, where: str) -> str:
        text = self._decode(line, f"the record in {where}")
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._error(f"the record in {where} is not JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise self._error(f"the record in {where} is not a JSON object")
        return self._require_text(record.get(self._text_field), record, f"the record in {where}")

    def _require_text(self, text: object, fields: Iterable[str], where: str) -> str:
        if isinstance(text, str):
            return text
        raise self._error(
            f"{where} has no text in the field data.text_field={self._text_field!r}; "
            f"its fields are {', '.join(sorted(fields)) or 'none'}"
        )

    def _open_parquet(self, path: pathlib.Path):
        try:
            import pyarrow.parquet
        except ImportError:
            raise self._error(
                f'{path} needs the package pyarrow: pip install "msa-jax[parquet]"'
            ) from None
        return pyarrow.parquet.ParquetFile(path)

    def _read_parquet(self, path: pathlib.Path, group: int) -> list[str]:
        with self._open_parquet(path) as file:
            fields = file.schema_arrow.names
            columns = [self._text_field] if self._text_field in fields else []
            table = file.read_row_group(group, columns=columns)
        texts = table.column(0).to_pylist() if columns else [None] * table.num_rows
        return [
            self._require_text(text, fields, f"record {number} in row group {group} of {path}")
            for number, text in enumerate(texts)
        ]


def open_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """The training and the validation part of the corpus that `config` names.

    Raises:
      ConfigError: there are no files or only one, one cannot be read, or a part has no text.
    """
    files, label = find_files(config)
    parts = []
    for name, part in zip(
        ("training", "validation"), split_files(files, config.validation_fraction), strict=True
    ):
        corpus = Corpus(part, text_field=config.text_field, label=label)
        if not corpus.has_text():
            raise ConfigError(
                f"{label}: the split into training and validation is by file, and the {name} part "
                f"({len(part)} of {len(files)} files) has no text; give more files, or change "
                f"data.validation_fraction={config.validation_fraction}"
            )
        parts.append(corpus)
    return parts[0], parts[1]


def find_files(config: DataConfig) -> tuple[list[CorpusFile], str]:
    """The files of `config`, ordered by name, and what errors call them.

    Raises:
      ConfigError: there are none, or one cannot be read.
    """
    if config.source == "stdlib":
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        label = "data.source='stdlib'"
        files = _standard_library(root)
        mend = f'no .py files in {root}; set data.source="files" and data.files to a glob'
    else:
        label = f"data.files={config.files!r}"
        pattern = os.path.expanduser(config.files)
        root = _fixed_prefix(pattern)
        files = [pathlib.Path(path) for path in glob.glob(pattern, recursive=True)]
        mend = "matches no file"
    try:
        found = [
            CorpusFile(path.relative_to(root).as_posix(), path, path.stat().st_size)
            for path in files
            if not path.is_dir()
        ]
    except OSError as error:
        raise ConfigError(f"{label}: {error.filename} cannot be read ({error.strerror})") from None
    if not found:
        raise ConfigError(f"{label}: {mend}")
    return sorted(found, key=lambda file: file.name), label


def split_files(
    files: Sequence[CorpusFile], validation_fraction: float
) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """Splits by a hash of the name: a file stays in its part when others come and go.

    Two files or more leave neither part empty: where the hashes alone would, the file whose hash is
    nearest to the empty part goes there.
    """
    hashes = {file.name: _unit_hash(file.name) for file in files}
    limit = validation_fraction
    if len(files) > 1:
        limit = max(limit, min(hashes.values()) + 2**-53)
        limit = min(limit, max(hashes.values()))
    training = [file for file in files if hashes[file.name] >= limit]
    validation = [file for file in files if hashes[file.name] < limit]
    return training, validation


def corpus_digest(corpora: Sequence[Corpus]) -> str:
    """A hash of the names and sizes of all files: whether a corpus is still the one it was."""
    listing = [[(file.name, file.size) for file in corpus.files] for corpus in corpora]
    return hashlib.blake2b(json.dumps(listing).encode(), digest_size=8).hexdigest()


def _unit_hash(name: str) -> float:
    """A number in [0, 1) from `name`, the same on every machine (Python's hash is salted)."""
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8)
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def _standard_library(root: pathlib.Path) -> list[pathlib.Path]:
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_excluded(name)]
        paths += [
            pathlib.Path(folder, name)
            for name in names
            if name.endswith(".py") and not _is_excluded(name)
        ]
    return paths


def _is_excluded(name: str) -> bool:
    return name in EXCLUDED_FOLDERS or name.startswith(EXCLUDED_PREFIXES)


def _fixed_prefix(pattern: str) -> pathlib.Path:
    """The folder that all matches of a glob lie in: its parents without wildcards."""
    folder = pathlib.Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder
