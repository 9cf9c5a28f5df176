"""What a run is asked for: kept in its folder, so that it can be resumed."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budgets import Budget
from ..errors import KvarnError
from ..recipe import Recipe
from .subjects import KvarnSubject, Subject
from .suites import Suite
from .tasks import Materials

MATERIALS = ("text", "qa", "gsm8k")  # the files that Materials may be given


@dataclass(frozen=True)
class Request:
    """``recipes`` are measured under each of ``budgets``, where they take one; ``peers``: as in ``peers.subjects``;
    ``files``: path of each material by name; ``data``: files with tasks; ``shard`` (i, n): every nth case, from the
    ith on. ``digests``: SHA-256 of every file."""

    model: str
    dtype: str
    device: str | None
    recipes: tuple[str, ...]
    budgets: tuple[Budget, ...]
    peers: str
    suite: Suite
    seed: int
    files: dict[str, str]
    data: tuple[str, ...]
    shard: tuple[int, int]
    digests: dict[str, str]

    @classmethod
    def of(cls, **asked: Any) -> "Request":
        """Reads the files once for their digests; raises KvarnError where one cannot be read."""
        paths = [*asked["files"].values(), *asked["data"]]
        return cls(**asked, digests={path: _digest(path) for path in paths})

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "Request":
        """What ``to_dict`` gave; raises KvarnError where a file has changed since."""
        suite = Suite(**{name: _tuple(value) for name, value in known["suite"].items()})
        request = cls(**{name: _tuple(value) for name, value in known.items()} | {"suite": suite})
        for path, digest in request.digests.items():
            if _digest(path) != digest:
                raise KvarnError(f"{path} has changed since the run began, so results would not be comparable")
        return request

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def materials(self, tokenizer: PreTrainedTokenizerBase) -> Materials:
        return Materials(tokenizer, **{name: Path(path) for name, path in self.files.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise KvarnError(f"{path}: {error.strerror}") from error


def kvarn_subjects(model: PreTrainedModel, recipes: Sequence[str], budgets: Sequence[Budget]) -> list[Subject]:
    """The full cache first, then every recipe under every budget. Recipes that evict nothing take no budget."""
    subjects: list[Subject] = [KvarnSubject(model, "full")]
    for recipe in map(Recipe.parse, recipes):
        evicts = any(method.eviction() is not None for method in recipe.methods)
        for budget in budgets if evicts and budgets else (None,):
            subject = KvarnSubject(model, str(recipe), budget)
            if subject.label not in [other.label for other in subjects]:
                subjects.append(subject)
    return subjects
