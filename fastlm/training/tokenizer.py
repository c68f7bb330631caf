"""Vocabularies of characters, words or byte pairs, learnt from a text and saved in the form of transformers."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastlm.training.options import Normalization, Vocabulary

UNKNOWN = "<unk>"
# What no text file needs; tab and line feed stay.
CONTROL_CHARACTERS = r"[\x00-\x08\x0b-\x1f\x7f]"
# Every character belongs to exactly one match, so that decoding is joining. A word takes the space before it along,
# which keeps spaces from doubling the length of the sequence.
# Learning byte pairs takes time that grows with the square of a word's length, and a text may have no spaces.
LONG_WORD = r"\S{64}"
PIECES = {"char": r"[\s\S]", "word": r" ?\w+(?:['\u2019]\w+)*| ?[^\w\s]|\s"}


def make_normalizer(form: Normalization = "nfc", lowercase: bool = False) -> normalizers.Normalizer:
    """The cleaning of a text: Unicode normal form, control characters left out, lower case where asked for."""
    steps = [] if form == "none" else [{"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[form]()]
    steps.append(normalizers.Replace(Regex(CONTROL_CHARACTERS), ""))
    if lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)


def learn_tokenizer(
    texts: Iterable[str], kind: Vocabulary, vocab_size: int, normalizer: normalizers.Normalizer
) -> PreTrainedTokenizerFast:
    """Learns a vocabulary.

    Args:
        texts (iterable of str): read once, never held as a whole.
        kind (str): "char", every character seen; "word", the most frequent words, punctuation marks and white space;
            "bpe", merged pairs of bytes, for which nothing is unknown. Joining the pieces gives the text again.
        vocab_size (int): at most so many entries; for "bpe" not below 256. All characters are taken for "char".
        normalizer (Normalizer): part of the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE()) if kind == "bpe" else _whole_pieces(PIECES[kind])
    tokenizer.normalizer = normalizer
    if kind == "char":  # the trainer takes four times as long
        counts = Counter(itertools.chain.from_iterable(map(normalizer.normalize_str, texts)))
        characters = sorted(counts, key=lambda character: (-counts[character], character))
        tokenizer.model = models.WordLevel({piece: i for i, piece in enumerate([UNKNOWN, *characters])}, UNKNOWN)
    elif kind == "word":
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False)
        _train(tokenizer, texts, trainer)
    else:
        _learn_byte_pairs(tokenizer, texts, vocab_size)
    unknown = None if kind == "bpe" else UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, clean_up_tokenization_spaces=False, model_max_length=10**30
    )


def _whole_pieces(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _learn_byte_pairs(tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet):
        raise ValueError(f"vocab_size: expected at least {len(alphabet)} for bpe, got {vocab_size}")
    cut = pre_tokenizers.Split(Regex(LONG_WORD), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    _train(tokenizer, texts, trainer)


def _train(tokenizer: Tokenizer, texts: Iterable[str], trainer: Any) -> None:
    """In a thread of its own: a trainer may take minutes, and does not hear of Ctrl-C."""
    failures: list[BaseException] = []

    def train() -> None:
        try:
            tokenizer.train_from_iterator(texts, trainer)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train, name="learning a vocabulary", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
