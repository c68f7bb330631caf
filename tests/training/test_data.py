"""Files to tokens to batches: nothing lost, nothing twice, bad files named."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from fastlm.training.data import IGNORED, BlockDataset, StreamDataset, Tokens, split_file, tokenize
from fastlm.training.tokenizer import learn_tokenizer, make_normalizer
from tests.training.conftest import make_text

PLAIN = make_normalizer("none")


def tokens_of(values, parts=1):
    pieces = np.array_split(np.array(values, np.int32), parts)
    rows = pa.chunked_array([pa.array([piece], pa.list_(pa.int32())) for piece in pieces])
    return Tokens(Dataset(pa.table({"tokens": rows})))


def write(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content", [make_text(300_000), "x" * 300_000, "\n" * 70_000, "ab"], ids=["lines", "one", "empty", "2"]
)
def test_parts_are_the_whole_text(content, tmp_path):
    train, valid = split_file(write(tmp_path, content.encode()), PLAIN, 0.1)
    assert "".join(train.texts()) == content[: int(len(content) * 0.9)]
    assert "".join(valid.texts()) == content[int(len(content) * 0.9) :]
    assert (train.characters, valid.characters) == (int(len(content) * 0.9), len(content) - int(len(content) * 0.9))


def test_cleaning(tmp_path):
    path = write(tmp_path, "\ufeffe\u0301a\r\nb\x00c\rd\te".encode())
    train, valid = split_file(path, make_normalizer("nfc"), 0.01)
    assert "".join([*train.texts(), *valid.texts()]) == "éa\nbc\nd\te"
    assert make_normalizer("nfkc", lowercase=True).normalize_str("ﬁX") == "fix"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected text, got an empty file"),
        (b"\xef\xbb\xbf", "expected text, got an empty file"),
        ("é".encode() * 600_000 + b"\xff", "expected UTF-8 text, got byte 0xff at 1200000"),
        (b"abc\xc3", "expected UTF-8 text, got byte 0xc3 at 3"),
    ],
    ids=["empty", "mark-alone", "late-byte", "cut-off"],
)
def test_bad_file(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as raised:
        split_file(path, PLAIN, 0.1)
    assert str(path) in str(raised.value)


def test_tokens_are_those_of_the_text_and_follow_its_changes(text_file):
    train, valid = split_file(text_file, PLAIN, 0.1)
    tokenizer = learn_tokenizer(train.texts(), "char", 0, PLAIN).backend_tokenizer
    text = text_file.read_text(encoding="utf-8")
    for part in (train, valid):
        tokens = tokenize(part, tokenizer)
        assert tokenizer.decode(tokens[:].tolist()) == text[part.first : part.last]
    text_file.write_text(text[::-1], encoding="utf-8")
    train, _ = split_file(text_file, PLAIN, 0.1)
    assert tokenizer.decode(tokenize(train, tokenizer)[:50].tolist()) == text[::-1][:50]


def test_tokens_across_parts():
    tokens = tokens_of(range(20), parts=6)
    assert len(tokens) == 20
    for start, stop in [(0, 20), (0, 1), (3, 4), (2, 15), (19, 25), (20, 22), (7, 7)]:
        assert tokens[start:stop].tolist() == list(range(20))[start:stop]
    assert tokens.count(7) == 1
    assert tokens.count(None) == 0


@pytest.mark.parametrize(("count", "rows"), [(161, 4), (100, 4), (99, 3), (9, 8), (41, 1), (1000, 7)])
def test_streams_are_contiguous_and_complete(count, rows):
    stream = StreamDataset(tokens_of(range(count), parts=3), seq_len=8, rows=rows)
    steps = [stream.__getitems__(list(range(i, i + stream.rows))) for i in range(0, len(stream), stream.rows)]
    assert [step["first"] for step in steps] == [True] + [False] * (len(steps) - 1)
    inputs, targets = (torch.cat([step[name] for step in steps], 1) for name in ("input_ids", "shift_labels"))
    real = targets != IGNORED
    assert torch.equal(targets[real], inputs[real] + 1)
    assert sorted(targets[real].tolist()) == list(range(1, count))
    for row, counted in zip(inputs, real, strict=True):  # each row goes on from batch to batch
        assert (row[counted].diff() == 1).all()


def test_blocks_are_all_windows():
    blocks = BlockDataset(tokens_of(range(30)), 8)
    batch = blocks.__getitems__([0, len(blocks) - 1])
    assert batch["input_ids"].tolist() == [list(range(8)), list(range(21, 29))]
    assert batch["shift_labels"].tolist() == [list(range(1, 9)), list(range(22, 30))]
    assert batch["first"]
