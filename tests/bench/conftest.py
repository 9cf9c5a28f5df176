"""A tiny chat model and what the bench asks of it."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvarn
from tiny_chat import save_tiny_chat

PROSE = "The mill by the river grinds rye and barley, and the miller counts the sacks at dusk. "


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture
def tiny_chat(tiny_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return kvarn.load(tiny_folder)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(PROSE * 40, encoding="utf-8")
    return path
