"""The documents of a corpus: local .txt, .jsonl, .jsonl.gz and .parquet files, or a data set of the Hugging Face hub.

A corpus is cut into shards, a file or a row group of a .parquet file, which processes read independently of each other.
The order of the shards is the order of the documents. One document, or one batch of rows, is in memory at a time.
"""

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from data.files import file_fingerprint, find_files

ANSWER_S = 5  # limit for the hub's first answer, from each of its addresses
_ROWS = 256  # rows of a .parquet file in memory
_MANY_FILES = 64  # as many files on the hub are shards enough: their footers need not be read first


class Bad(ValueError):
    """A document that cannot be read, or the rest of a file that breaks off: file, line or row, and the reason."""


@dataclass(frozen=True)
class TextFiles:
    """.txt files, a document each, and .jsonl and .jsonl.gz files, a document a line; every file is a shard."""

    name: str
    files: tuple[str, ...]
    sizes: Sequence[int]
    text_key: str = "text"

    def fingerprint(self) -> str:
        return file_fingerprint(self.files, self.text_key)

    def read(self, shard: int) -> Iterator[tuple[str | Bad, int]]:
        """Yield the documents of a shard in order, each with the bytes of sizes[shard] that are read."""
        path, number = self.files[shard], 0
        with open(path, "rb") as file:
            if path.endswith(".txt"):
                yield _decode(file.read().removeprefix(codecs.BOM_UTF8), path), self.sizes[shard]
                return
            lines = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
            try:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield _text_of(line, self.text_key, path, number), file.tell()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Bad(f"{path}, near line {number + 1}: the compressed file is broken ({error})"), file.tell()


def _decode(data: bytes, where: str) -> str | Bad:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Bad(f"{where}: is not UTF-8 (byte {error.start})")


def _text_of(line: bytes, text_key: str, path: str, number: int) -> str | Bad:
    try:
        value = from_json(line, cache_strings=False)  # pydantic's parser: three times as fast as json
    except ValueError:
        try:
            value = json.loads(line)  # also takes half a surrogate pair, and a byte order mark
        except (ValueError, RecursionError) as error:
            return Bad(f"{path}, line {number}: is not JSON ({first_line(error)})")
    if not isinstance(value, dict):
        reason = f'is not a JSON object with a key "{text_key}"'
    elif text_key not in value:
        reason = f'has no key "{text_key}"; {_choice([key for key in value if isinstance(value[key], str)])}'
    elif not isinstance(value[text_key], str):
        reason = f'"{text_key}" is not text but {json.dumps(value[text_key])[:40]}'
    else:
        return value[text_key]
    return Bad(f"{path}, line {number}: {reason}")


@dataclass(frozen=True)
class Rows:
    """Rows of an IterableDataset with one column. files: local .parquet files; () means that it comes from the hub.

    places: names of the dataset's shards. bad: files that cannot be read at all, which come first.
    """

    name: str
    dataset: Any
    identity: str
    files: tuple[str, ...] = ()
    places: Sequence[str] = ()
    bad: Sequence[Bad] = ()

    @property
    def sizes(self) -> Sequence[int]:
        return [1] * (len(self.bad) + len(self.places))

    def fingerprint(self) -> str:
        return file_fingerprint(self.files, self.identity)

    def read(self, shard: int) -> Iterator[tuple[str | Bad, int]]:
        """Yield the documents of a shard in order, each with 0: the shard is not read to its end.

        Raises:
            ValueError: the shard cannot be read now, which says nothing about its bytes.
        """
        import pyarrow as pa

        if shard < len(self.bad):
            yield self.bad[shard], 0
            return
        shard, row = shard - len(self.bad), 0
        place = self.places[shard]
        try:
            rows = self.dataset.shard(len(self.places), shard).with_format("arrow")
            for batch in rows.iter(_ROWS):
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    row += 1
                    where = f"{place}, row {row}"
                    yield Bad(f"{where}: is null") if data is None else _decode(data, where), 0
        except Exception as error:
            broken = isinstance(error, pa.ArrowInvalid) or (self.files and type(error) is OSError and not error.errno)
            if not broken:  # memory, the disk, or the network
                raise ValueError(f"{place}, row {row}: cannot be read now ({first_line(error)})") from None
            yield Bad(f"{place}, row {row}: the rest cannot be read ({first_line(error)})"), 0


Corpus = TextFiles | Rows


def local_files(patterns: list[str], text_key: str) -> Corpus:
    """Return the documents of the files that find_files finds.

    Raises:
        ValueError: find_files does, or .parquet files are mixed with others.
    """
    files, sizes = find_files(patterns)
    name = ", ".join(patterns)
    if any(path.endswith(".parquet") for path in files):
        if not all(path.endswith(".parquet") for path in files):
            raise ValueError(f"--input {name}: finds .parquet files and others; prepare one kind at a time")
        return parquet_files(name, files, text_key)
    return TextFiles(name, files, sizes, text_key)


def parquet_files(name: str, files: Sequence[str], text_key: str) -> Rows:
    """Return the rows of local .parquet files; every row group is a shard."""
    import pyarrow.dataset
    import pyarrow.parquet as pq

    good: list[str] = []
    places: list[str] = []
    bad: list[Bad] = []
    for path in files:
        try:
            if "::" in path:
                raise ValueError('has "::" in its name, which chains file systems to `datasets`; rename it')
            with open(path, "rb") as file, pq.ParquetFile(file) as parquet:
                _check_column(parquet.schema_arrow, text_key)
                if parquet.metadata.num_rows:  # `datasets` fails on none
                    good.append(glob.escape(os.path.abspath(path)))
                    places += [f"{path}, row group {i}" for i in range(parquet.num_row_groups)]
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None):
                raise
            bad.append(Bad(f"{path}: {first_line(error)}"))
    scan = pyarrow.dataset.ParquetFragmentScanOptions(
        use_buffered_stream=True,  # or whole columns of a row group are read
        buffer_size=2**20,
        page_checksum_verification=True,
    )
    options = {"data_files": good, "columns": [text_key], "fragment_scan_options": scan}
    dataset = _load_streaming("parquet", **options).reshard() if good else None
    return Rows(name, dataset, text_key, tuple(files), places, bad)


def hub_dataset(name: str, config: str | None, revision: str | None, text_key: str) -> Rows:
    """Return the split "train" of a data set of the hub, streamed: nothing is kept on the disk.

    With HF_HUB_OFFLINE, return its .parquet files in the cache.

    Raises:
        ValueError: the hub does not answer, it lacks the data set, or the files are not in the cache.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    label = f"{name} at {revision[:8]}" if revision else name
    try:
        if constants.HF_HUB_OFFLINE:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
            return parquet_files(label, _cached_parquet(folder, config), text_key)
        HfApi().dataset_info(name, revision=revision, timeout=ANSWER_S)  # `datasets` would try again for minutes
        dataset = _load_streaming(name, config, revision=revision)
        if (features := dataset.features) is not None:
            _check_column(features.arrow_schema, text_key)
        dataset = dataset.select_columns([text_key])
        dataset = dataset if dataset.num_shards >= _MANY_FILES else dataset.reshard()
    except Exception as error:  # also errors of the HTTP library
        raise ValueError(f"{name} cannot be loaded ({first_line(error)})") from None
    places = [f"{label}, shard {i}" for i in range(dataset.num_shards)]
    return Rows(label, dataset, repr((name, config, revision, text_key)), places=places)


def _load_streaming(*arguments: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)  # an error is said once, by us
    return datasets.load_dataset(*arguments, **options, split="train", streaming=True)


def _cached_parquet(folder: str, config: str | None) -> list[str]:
    top = Path(folder, config) if config and Path(folder, config).is_dir() else Path(folder)
    found = sorted(str(path) for path in top.rglob("*.parquet"))
    files = [path for path in found if "train" in os.path.relpath(path, folder)] or found
    if not files:
        raise ValueError(f"{top}: the cache holds no .parquet file")
    if (match := re.search(r"-of-(\d+)\.parquet$", files[-1])) and len(files) != int(match[1]):
        raise ValueError(f"{top}: the cache has {len(files)} of {int(match[1])} .parquet files")
    return files


def _check_column(schema: Any, text_key: str) -> None:
    """Check that a column of an Arrow schema holds text.

    Raises:
        ValueError: the column is absent, or holds something else.
    """
    kinds = {field.name: str(field.type) for field in schema}
    names = [
        name for name, kind in kinds.items() if re.match(r"(large_)?string|dictionary<values=(large_)?string", kind)
    ]
    if text_key not in names:
        found = f"does not hold text but {kinds[text_key]} in its column" if text_key in kinds else "has no column"
        raise ValueError(f'{found} "{text_key}"; {_choice(names)}')


def _choice(names: list[str]) -> str:
    listed = ", ".join(f'"{name}"' for name in names[:20])
    return f"text is in {listed}: choose one with --text-key" if names else "no other holds text"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
