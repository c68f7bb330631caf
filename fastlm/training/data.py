"""From a text file of any size to batches: memory-mapped tokens, contiguous streams and random blocks of them."""

import codecs
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

IGNORED = -100  # target of a position that does not count
READ_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 16  # a row of text; long, so that few words are cut at its ends where lines are endless
ROWS_AT_ONCE = 16  # that the threads of the tokenizer share

Batch = dict[str, Any]
Show = Callable[[str, float | None], None]  # gets a stage's name and how much is done, 0 to 1; None: nobody knows
_T = TypeVar("_T")


class Progress:
    """Tells `show` how much of a stage is done. Where `datasets` makes a key of them, all are the same."""

    def __init__(self, show: Show | None = None) -> None:
        self.show = show or (lambda stage, done: None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Progress, ()

    def over(
        self, stage: str, items: Iterable[_T], total: int, size: Callable[[_T], int] = lambda item: 1
    ) -> Iterator[_T]:
        """The items of a stage, whose sizes come to `total`."""
        self.show(stage, 0)
        done = 0
        for item in items:
            yield item
            done += size(item)
            self.show(stage, done / total)

    def then(self, stage: str, items: Iterable[_T]) -> Iterator[_T]:
        """The items, and then a stage that cannot be looked into."""
        yield from items
        self.show(stage, None)

    def texts(self, stage: str, split: "Split") -> Iterator[str]:
        """A split's texts."""
        return self.over(stage, split.texts(), split.characters, len)


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


def split_file(
    path: Path, normalizer: Normalizer, validation: float, progress: Progress | None = None
) -> tuple[Split, Split]:
    """Reads a file once and splits it: training text, then the validation fraction at its end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 text, or there is none in it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected a regular file, for it is read more than once")
    # The share of a text that is not all ASCII counts as less than it is.
    pieces = (progress or Progress()).over("reading", _pieces(path), path.stat().st_size, len)
    total = sum(len(normalizer.normalize_str(piece)) for piece in pieces)
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
        parts = [part.flatten() for part in dataset.data.column("tokens").chunks]
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


def tokenize(split: Split, tokenizer: Tokenizer, progress: Progress | None = None) -> Tokens:
    """Turns a split into tokens, in the cache of `datasets` (HF_DATASETS_CACHE), where a second call finds them."""
    status = split.path.stat()
    source = {"split": split, "tokenizer": tokenizer, "progress": progress or Progress()}
    return Tokens(
        Dataset.from_generator(
            _encoded,
            features=Features({"tokens": List(Value("int32"))}),
            gen_kwargs={**source, "size": status.st_size, "modified": status.st_mtime_ns},  # the cache's key
            writer_batch_size=ROWS_AT_ONCE,
        )
    )


def _encoded(
    split: Split, tokenizer: Tokenizer, progress: Progress, size: int, modified: int
) -> Iterator[dict[str, np.ndarray]]:
    texts = progress.texts("tokenizing", split)
    while rows := list(itertools.islice(texts, ROWS_AT_ONCE)):
        for row in tokenizer.encode_batch_fast(rows, add_special_tokens=False):
            yield {"tokens": np.array(row.ids, np.int32)}


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
