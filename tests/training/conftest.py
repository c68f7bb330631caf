"""A small text, and a cache of `datasets` that goes away."""

import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

TEXT = "the a Könijin naïve sat on mat, and then? saw: dog's house. O'er hill — far away! 42 times"
WORDS = TEXT.split()


def make_text(characters: int, seed: int = 0) -> str:
    """Lines of random words that follow each other unevenly, so that there is something to learn."""
    draw = random.Random(seed)
    lines, length = [], 0
    while length < characters:
        first = draw.randrange(len(WORDS))
        line = " ".join(WORDS[(first + step * draw.choice([1, 1, 1, 5])) % len(WORDS)] for step in range(9))
        lines.append(line + draw.choice(["\n", "\n", "\n\n"]))
        length += len(lines[-1])
    return "".join(lines)[:characters]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # for processes that a test starts
    monkeypatch.delenv("FASTLM_DATA", raising=False)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path
