"""From a text file of any size to batches: memory-mapped tokens, contiguous streams and random blocks of them."""

import codecs
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, Value
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

IGNORED = -100  # target of a position that does not count
READ_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 16  # a row of text; long, so that few words are cut at its ends where lines are endless

Batch = dict[str, Any]


class Split(NamedTuple):
    """Characters first <= i < last of a file's cleaned text."""

    path: Path
    normalizer: Normalizer
    first: int
    last: int

    def texts(self) -> Iterator[str]:
        """The text in pieces, which end at line ends where there are any."""
        position = 0
        for piece in _pieces(self.path):
            text = self.normalizer.normalize_str(piece)
            part = text[max(self.first - position, 0) : max(self.last - position, 0)]
            if part:
                yield part
            position += len(text)
            if position >= self.last:
                return

    @property
    def characters(self) -> int:
        """How many."""
        return self.last - self.first


def split_file(path: Path, normalizer: Normalizer, validation: float) -> tuple[Split, Split]:
    """Reads a file once and splits it: training text, then the validation fraction at its end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text, or there is none in it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a regular file, for it is read more than once")
    total = sum(len(normalizer.normalize_str(piece)) for piece in _pieces(path))
    if total == 0:
        raise ValueError(f"{path}: expected text, got an empty file")
    cut = int(total * (1 - validation))
    return Split(path, normalizer, 0, cut), Split(path, normalizer, cut, total)


def _pieces(path: Path) -> Iterator[str]:
    """A file's text, with line feeds for any kind of line end and without a byte order mark."""
    rest = ""
    for text in _decoded(path):
        text = rest + text
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def _decoded(path: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    with open(path, "rb") as file:
        while True:
            block = file.read(READ_BYTES)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#x} at {position}"
                ) from error
            if not block:
                return


class Tokens:
    """The tokens of a split: len() of them, and tokens[i:j] as an array, read from a memory-mapped file."""

    def __init__(self, dataset: Dataset) -> None:
        parts = dataset.data.column("token").chunks
        self._parts = [part.to_numpy() for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        found = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[part]) - len(self._parts[part])
            found.append(self._parts[part][start - begin : stop - begin])
            start += len(found[-1])
            part += 1
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.int32)])

    def count(self, token: int | None) -> int:
        """How often a token is there; 0 for None."""
        return 0 if token is None else sum(int((part == token).sum()) for part in self._parts)


def tokenize(split: Split, tokenizer: Tokenizer) -> Tokens:
    """Turns a split into tokens, in the cache of `datasets` (HF_DATASETS_CACHE), where a second call finds them."""
    status = split.path.stat()
    source = {"split": split, "size": status.st_size, "modified": status.st_mtime_ns}  # part of the cache's key
    rows = Dataset.from_generator(_rows, features=Features({"text": Value("large_string")}), gen_kwargs=source)
    return Tokens(
        rows.map(
            _encode,
            batched=True,
            batch_size=16,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=["text"],
            features=Features({"token": Value("int32")}),
            writer_batch_size=1 << 24,
        )
    )


def _rows(split: Split, size: int, modified: int) -> Iterator[dict[str, str]]:
    for text in split.texts():
        yield {"text": text}


def _encode(rows: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    encoded = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
    return {"token": np.concatenate([np.array(row.ids, np.int32) for row in encoded])}


class StreamDataset(TorchDataset):
    """All tokens of a split, in order, as `rows` parallel streams.

    Item `step * rows + row` is what row `row` reads in step `step`, so that sequential batches of `rows` items go on
    where the one before ended. A batch's "first" says that it begins the streams. Every token but the first is a
    target once; where the last rows are shorter, their targets are IGNORED.
    """

    def __init__(self, tokens: Tokens, seq_len: int, rows: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.rows = max(1, min(rows, (len(tokens) - 1) // seq_len))
        self.row_len = math.ceil((len(tokens) - 1) / self.rows)

    def __len__(self) -> int:
        return math.ceil(self.row_len / self.seq_len) * self.rows

    def __getitems__(self, items: list[int]) -> Batch:
        """A batch, given the items of one step."""
        begin = items[0] // self.rows * self.seq_len
        starts = [item % self.rows * self.row_len + begin for item in items]
        return {"first": begin == 0, **read_windows(self.tokens, starts, min(self.seq_len, self.row_len - begin))}


class BlockDataset(TorchDataset):
    """Every window of seq_len tokens, by its offset; each stands for itself."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return len(self.tokens) - self.seq_len

    def __getitems__(self, items: list[int]) -> Batch:
        """A batch of the windows at these offsets."""
        return {"first": True, **read_windows(self.tokens, items, self.seq_len)}


def read_windows(tokens: Tokens, starts: list[int], length: int) -> dict[str, Tensor]:
    """The input_ids that begin at these tokens and their targets, shift_labels; both (B, length)."""
    windows = torch.full((len(starts), length + 1), IGNORED)
    for window, start in zip(windows.numpy(), starts, strict=True):
        found = tokens[start : start + length + 1]
        window[: len(found)] = found
    return {"input_ids": windows[:, :-1].clamp(min=0), "shift_labels": windows[:, 1:]}
