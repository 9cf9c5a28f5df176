"""Scores that observe the attention of every query, and remember it in columns beside the entries."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import observed
from ..attention.updates import Mass, Update
from ..formats import ColumnType
from .scores import Score
from .view import Observation, PromptView

Columns = Mapping[str, Tensor]


class ObservingScore(Score):
    """A score of columns that change with the attention of each query.

    Observing works on all heads of a layer at once. It is the same for a block of a prompt's queries and for the query
    of a decoding step, so a prompt gives what its tokens would give one by one, up to what later tokens would have
    found evicted.
    """

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, ColumnType]:
        """The names of the columns, each with its dtype, or its shape and dtype."""

    @property
    def of_prompt(self) -> int | None:
        """How many of a prompt's last queries are observed; None: all."""
        return None

    @property
    def update(self) -> Update | None:
        """``observe`` for the query of a decoding step, as kernels know it; None: they do not."""
        return None

    @property
    def forgets(self) -> bool:
        """Whether of a decoding step's queries only the newest counts, so that those before it need not be observed."""
        return False

    @property
    def finishes(self) -> bool:
        """Whether columns have to be ``finished`` before entries are chosen by them."""
        return False

    def finished(self, columns: Columns) -> dict[str, Tensor]:
        """The columns ([R, n, …], with "position", -1 where nothing is) of heads whose entries are to be chosen, after
        the last query that was observed."""
        return {}

    def fresh(self, positions: Tensor, first: Tensor) -> dict[str, Tensor]:
        """The columns of entries at ``positions`` (int64, any shape), of which the queries from ``first`` on (int64, to
        be broadcast) are observed; zeros here."""
        kinds = {name: kind if isinstance(kind, tuple) else ((), kind) for name, kind in self.columns.items()}
        return {name: positions.new_zeros((*positions.shape, *s), dtype=d) for name, (s, d) in kinds.items()}

    @abstractmethod
    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        """The columns after some queries: of the old ones ([B, K, n, …], with "position", -1 where nothing is)."""

    def prompt(self, view: PromptView) -> Tensor:
        return self.stored(view.columns, view.seen[:, None, None])

    def after_prompt(self, view: PromptView, layer: int) -> PromptView:
        """``view`` with the prompt's queries in its columns."""
        query, positions, parts = view.query, view.query_positions, view.parts
        if self.of_prompt is not None and self.of_prompt < query.shape[2]:
            query, parts = view.last_queries(self.of_prompt)
            positions = view.last_positions(self.of_prompt)
        columns = {"position": view.positions, **view.columns}
        decoded, first = torch.zeros_like(view.seen), 0
        for paid in observed(query, parts, view.variant):
            count = paid.shares[0].shape[3]
            observation = Observation(paid, positions[:, first : first + count], decoded, layer)
            columns |= self.observe(observation, columns)
            first += count
        return replace(view, columns=columns)


@dataclass(frozen=True)
class AccumulatedMass(ObservingScore):
    """Attention mass received from all queries so far, averaged over the query heads of a KV head.

    H2O (arXiv 2306.14048): column sums of the softmax, in fp32, without decay or normalization.
    """

    @property
    def columns(self) -> Mapping[str, ColumnType]:
        return {"mass": torch.float32}

    @property
    def update(self) -> Update:
        return Mass("mass", adds=True)

    def observe(self, observation: Observation, columns: Columns) -> dict[str, Tensor]:
        return {"mass": columns["mass"] + observation.paid.mass.mean(2)}

    def stored(self, columns: Columns, seen: Tensor) -> Tensor:
        return columns["mass"]
