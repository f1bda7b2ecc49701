"""Documents from files: JSON lines, text and parquet, read as streams and never slurped whole.

A Part is a range of one file; a corpus' split is a list of Parts. Text is cut into documents so:
a line that is only <|endoftext|> always ends a document; without it, a document ends at the first
blank line after DOC_CHARS characters, and in text with no blank lines after MAX_DOC_CHARS.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOC_CHARS = 4096
MAX_DOC_CHARS = 16384
PART_BYTES = 128 << 20  # text files are worked on in ranges of this size
SEPARATOR = "<|endoftext|>"
_LINE_LIMIT = 1 << 16  # because "one line" may be the whole file


@dataclass(frozen=True)
class Document:
    """One document. `module`, `name`, `kind` and `doc` are empty for plain text."""

    text: str
    module: str = ""
    name: str = ""
    kind: str = ""
    doc: str = ""


def named_document(module: str, name: str, kind: str, head: str, doc: str) -> Document:
    """The document of one object: its definition line, a blank line, its docstring."""
    return Document(f"{head}\n\n{doc}", module, name, kind, doc)


@dataclass(frozen=True)
class Part:
    """The range [start, stop) of one file: bytes for "text" and "jsonl", rows for "parquet"."""

    path: Path
    kind: str
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        """Stream the documents of the range, in order."""
        if self.kind == "jsonl":
            return (named_document(*json.loads(line)) for line in _lines(self))
        texts = _read_parquet(self) if self.kind == "parquet" else _read_text(self)
        return (Document(text) for text in texts)

    def fingerprint(self) -> str:
        """SHA-256 that identifies the range's content.

        Text and JSON lines: of the bytes of the range. Parquet: of the file's name, size, row
        range and footer (which holds the statistics and positions of every column chunk), so that
        a hundred gigabytes need not be read.
        """
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            if self.kind == "parquet":
                size = self.path.stat().st_size
                digest.update(f"{self.path.name}:{size}:{self.start}:{self.stop}:".encode())
                file.seek(max(0, size - 8))
                footer = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - 8 - footer))
                digest.update(file.read())
            else:
                file.seek(self.start)
                left = self.stop - self.start
                while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                    digest.update(chunk)
                    left -= len(chunk)
        digest.update(f":{self.kind}:{DOC_CHARS}:{MAX_DOC_CHARS}".encode())
        return digest.hexdigest()


def _lines(part: Part, limit: int = -1) -> Iterator[str]:
    """The lines of a range of bytes, in pieces of at most `limit` bytes; a character that a piece
    ends in comes with the next, and bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    left = part.stop - part.start
    with open(part.path, "rb") as file:
        file.seek(part.start)
        while left > 0 and (piece := file.readline(min(left, limit) if limit > 0 else left)):
            left -= len(piece)
            yield decoder.decode(piece, final=left <= 0)


def _read_text(part: Part) -> Iterator[str]:
    text = ""
    for line in _lines(part, _LINE_LIMIT):
        ends = line.strip() == SEPARATOR
        if not ends:
            text += line.replace("\r\n", "\n")
            blank = not line.strip()
            ends = len(text) >= MAX_DOC_CHARS or (blank and len(text) >= DOC_CHARS)
        if ends:
            if text.strip():
                yield text.strip()
            text = ""
    if text.strip():
        yield text.strip()


def _parquet_file(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable parquet file ({error}); delete it and fetch it again"
        ) from error
    if "text" not in file.schema_arrow.names:
        raise ValueError(
            f"{path} has no column 'text' but {file.schema_arrow.names}; rename the column"
        )
    return file


def _read_parquet(part: Part) -> Iterator[str]:
    file = _parquet_file(part.path)
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        low, high = max(part.start, first), min(part.stop, first + rows)
        if low < high:
            column = file.read_row_group(group, columns=["text"]).column("text")
            texts = column.slice(low - first, high - low).to_pylist()
            yield from (text for text in texts if text and text.strip())
        first += rows


def find_files(data: Path) -> list[Path]:
    """The files of a local source: itself, or the .txt or .parquet files under a folder, sorted.

    Raises FileNotFoundError or ValueError with the remedy when there are none or both kinds.
    """
    if not data.exists():
        raise FileNotFoundError(
            f"data source {data} does not exist; give a text file, a folder of .txt or .parquet "
            "files, a .parquet file, or 'embedded'"
        )
    if data.is_file():
        return [data]
    texts, shards = sorted(data.rglob("*.txt")), sorted(data.rglob("*.parquet"))
    if texts and shards:
        raise ValueError(
            f"{data} holds {len(texts)} .txt and {len(shards)} .parquet files; separate them"
        )
    if not texts and not shards:
        raise FileNotFoundError(f"{data} holds no .txt or .parquet file")
    return texts or shards


def whole(path: Path) -> list[Part]:
    """Parts that cover one file: one per parquet file, ranges of PART_BYTES for text."""
    if path.suffix == ".parquet":
        return [Part(path, "parquet", 0, _parquet_file(path).metadata.num_rows)]
    return _text_parts(path, 0, path.stat().st_size)


def _text_parts(path: Path, start: int, stop: int) -> list[Part]:
    parts = []
    while start < stop:
        end = stop if stop - start <= PART_BYTES else text_cut(path, start + PART_BYTES, stop)
        parts.append(Part(path, "text", start, end))
        start = end
    return parts


def text_cut(path: Path, offset: int, stop: int) -> int:
    """The first place at or after byte `offset` >= 1 where a new paragraph (else a line) begins."""
    with open(path, "rb") as file:
        file.seek(offset - 1)
        while (piece := file.readline(_LINE_LIMIT)) and not piece.endswith(b"\n"):
            pass
        first = file.tell()
        while file.tell() < min(stop, offset + (1 << 16)):
            line = file.readline(_LINE_LIMIT).strip()
            if not line or line == SEPARATOR.encode():
                return min(file.tell(), stop)
    return min(first, stop)


def split_files(files: list[Path], val_fraction: float) -> tuple[list[Part], list[Part], str]:
    """Split local files into train and validation parts; also returns the rule in words.

    Several parquet files: the last file is validation. One parquet file: its last rows. Text: the
    last part of the files in sorted order, by bytes, cut at a paragraph.
    """
    if files[0].suffix == ".parquet":
        if len(files) > 1:
            train = [part for path in files[:-1] for part in whole(path)]
            return train, whole(files[-1]), "the last parquet file is validation"
        rows = _parquet_file(files[0]).metadata.num_rows
        cut = min(max(1, round(rows * (1 - val_fraction))), rows - 1)
        if cut < 1:
            raise ValueError(f"{files[0]} has {rows} rows, too few to split; give --val-data")
        train, val = Part(files[0], "parquet", 0, cut), Part(files[0], "parquet", cut, rows)
        return [train], [val], f"the last {rows - cut} of {rows} rows are validation"
    total = sum(path.stat().st_size for path in files)
    inside = int(total * (1 - val_fraction))  # of the bytes from here on
    train, val = [], []
    for path in files:
        size = path.stat().st_size
        # Several files are divided between files, except the one that the threshold falls into.
        cut = 0 if inside <= 0 else size if inside >= size else text_cut(path, inside, size)
        train += _text_parts(path, 0, cut)
        val += _text_parts(path, cut, size)
        inside -= size
    if not train or not val:
        raise ValueError(
            f"the text ({total} bytes in {len(files)} files) can't be split into train and "
            f"validation at a paragraph or line with val_fraction={val_fraction}; give --val-data"
        )
    return train, val, f"the last {val_fraction:.1%} by bytes, in sorted file order, are validation"
