"""Vocabularies: decoding gives the text again, saving gives the vocabulary again."""

import random

import pytest
from transformers import AutoTokenizer

from fastlm.training.tokenizer import UNKNOWN, learn_tokenizer, make_normalizer
from tests.child import check_python
from tests.training.conftest import make_text

TEXT = make_text(3000) + "  two  spaces\ttab \u2019tis it\u2019s 🙂é\n\n\n(end)"


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_round_trip(kind, tmp_path):
    tokenizer = learn_tokenizer([TEXT], kind, 1000, make_normalizer())
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == ids
    assert loaded.decode(ids) == TEXT
    assert len(loaded) == len(tokenizer)
    assert loaded("e\u0301\x00a")["input_ids"] == loaded("éa")["input_ids"]


def test_characters_are_one_token_each():
    tokenizer = learn_tokenizer(["ab\nc", "d a"], "char", 1, make_normalizer())
    assert len(tokenizer) == 7  # all of them, whatever vocab_size says, and the unknown one
    assert len(tokenizer("a b\n")["input_ids"]) == 4
    assert tokenizer.decode(tokenizer("aXb")["input_ids"]) == f"a{UNKNOWN}b"


def test_words_keep_their_apostrophes_and_the_most_frequent_stay():
    tokenizer = learn_tokenizer(["the cat's the the hat's hat's hat's hat's."], "word", 3, make_normalizer())
    assert tokenizer.convert_ids_to_tokens(tokenizer("a the hat's dog.")["input_ids"]) == [
        UNKNOWN,
        " the",
        " hat's",
        UNKNOWN,
        UNKNOWN,
    ]


def test_byte_pairs_know_everything():
    tokenizer = learn_tokenizer(["abc"], "bpe", 300, make_normalizer())
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer("日本 ünseen")["input_ids"]) == "日本 ünseen"
    with pytest.raises(ValueError, match="vocab_size: expected at least 256 for bpe, got 100"):
        learn_tokenizer(["abc"], "bpe", 100, make_normalizer())


def test_byte_pairs_of_a_text_without_spaces():
    """A word of its whole length would take hours to learn from."""
    text = "".join(random.Random(0).choices("ACGT", k=100_000))
    tokenizer = learn_tokenizer([text], "bpe", 400, make_normalizer())
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.4 * len(text)
    repeated = learn_tokenizer(["ab" * 50_000], "bpe", 400, make_normalizer())
    assert max(len(token) for token in repeated.get_vocab()) == 64


CTRL_C = """
import os, random, signal, threading
from fastlm.training.tokenizer import learn_tokenizer, make_normalizer

def texts():
    yield "".join(random.Random(0).choices("abcdefgh ", k=1_000_000))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

try:
    learn_tokenizer(texts(), "bpe", 30_000, make_normalizer())
except KeyboardInterrupt:
    print(sum(thread.name == "learning a vocabulary" for thread in threading.enumerate()))
"""


def test_learning_hears_of_ctrl_c():
    """Not only when it is done."""
    assert check_python(CTRL_C).strip() == "1"


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_text_that_cannot_be_read(kind):
    def texts():
        yield "some"
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        learn_tokenizer(texts(), kind, 300, make_normalizer())
