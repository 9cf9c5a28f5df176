"""A subject that predicts what it is told to and writes down what it reads."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvarn.bench.subjects import Held, System, label
from kvarn.budgets import Budget
from kvarn.errors import BudgetError

VOCABULARY = 400


@dataclass
class FakeSession:
    """``says``: the token that it predicts after each token (0 where none is given)."""

    says: dict[int, int]
    reads: list[list[int]]
    seen: list[int] = field(default_factory=list)
    closed: int = 0
    forks: list["FakeSession"] = field(default_factory=list)
    seconds: float = 0.5

    def read(self, tokens: Tensor) -> Tensor:
        assert not self.closed
        self.reads.append(self.seen + tokens[0].tolist())
        self.seen = self.reads[-1]
        logits = torch.zeros(len(tokens), VOCABULARY)
        logits[:, self.says.get(self.seen[-1], 0)] = 1
        return logits

    def fork(self) -> "FakeSession":
        self.forks.append(FakeSession(self.says, self.reads, list(self.seen)))
        return self.forks[-1]

    def held(self) -> Held:
        return Held(len(self.seen), 2 * len(self.seen), None, None)

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakeSubject:
    says: dict[int, int] = field(default_factory=dict)
    name: str = "fake"
    budget: Budget = None
    refuses: bool = False
    system: System = "kvarn"
    reads: list[list[int]] = field(default_factory=list)
    sessions: list[FakeSession] = field(default_factory=list)

    @property
    def label(self) -> str:
        return label(self.system, self.name, self.budget)

    def open(self) -> FakeSession:
        if self.refuses:
            raise BudgetError("the budget is\ntoo small")
        self.sessions.append(FakeSession(self.says, self.reads))
        return self.sessions[-1]

    def all_closed_once(self) -> bool:
        return all(s.closed == 1 and all(f.closed == 1 for f in s.forks) for s in self.sessions)
