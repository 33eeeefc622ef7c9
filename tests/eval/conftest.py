import random
from pathlib import Path

import pytest

from byte_tokenizer import byte_tokenizer
from tiny_model import tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = random.Random(0)
    path = tmp_path / "news.txt"
    path.write_text("".join(draw.choice("abcdefgh \n") for _ in range(200)), encoding="utf-8")
    return path
