"""Which request is read next, whether it fits, and which one goes when memory is short."""

from functools import lru_cache

from ..budgets import Budget
from ..memory import Arena
from ..plan import Planner
from ..recipe import Recipe
from ..spec import ModelSpec
from .requests import Request


class Sizes:
    """The most bytes that a sequence takes, by the plan of its prompt, which is read in chunks of ``chunk`` tokens."""

    def __init__(self, recipe: Recipe, spec: ModelSpec, budget: Budget, page_size: int, chunk: int | None):
        def planner(prompt: int) -> Planner:
            whole = chunk is None or prompt <= chunk
            return recipe.planner(spec, budget, [prompt], page_size, empty=whole)

        @lru_cache(maxsize=4096)
        def most(prompt: int, tokens: int) -> int:
            return int(planner(prompt).most(prompt + tokens))

        @lru_cache(maxsize=4096)
        def peak(prompt: int) -> int:
            each = planner(prompt)
            read = prompt if chunk is None else min(chunk, prompt)
            return int(each.peak(each.plan().capacity, read + (recipe.tail or 0)))

        self.most = most
        """Of a prompt and an answer of so many tokens; raises BudgetError."""
        self.peak = peak
        """While a prompt of so many tokens is read, with what a layer has in hand; raises BudgetError."""
        self.step = recipe.planner(spec, budget, [1], page_size).open_bytes
        """The most that a decoding step adds: an open page of every segment of a sequence's heads."""


class Scheduler:
    """Requests in the order in which they came: waiting, one that is being read, and those of the running batch.

    A request is admitted when the most that it takes while its prompt is read and at its end (or took when it was
    preempted) fits beside what is held and a further token of each sequence that runs. When memory is short
    nevertheless, the newest one goes back to wait in its old place.
    """

    def __init__(self, arena: Arena, sizes: Sizes, max_batch: int):
        self.arena, self.sizes, self.max_batch = arena, sizes, max_batch
        self.waiting: list[Request] = []
        self.reading: Request | None = None
        self.running: list[Request] = []

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.reading)

    def wait(self, request: Request) -> None:
        """Puts a request in its place among those that wait."""
        place = next((i for i, other in enumerate(self.waiting) if other.number > request.number), len(self.waiting))
        self.waiting.insert(place, request)

    def admit(self) -> Request | None:
        """The request to go on with: the one that is being read, or else the first that waits, if it fits."""
        if self.reading is None and self.waiting and self._fits(self.waiting[0]):
            self.reading = self.waiting.pop(0)
        return self.reading

    def start(self, request: Request) -> None:
        """``request`` has been read and runs."""
        self.reading = None
        self.running.append(request)

    def stop(self, row: int) -> None:
        """Removes the request at ``row`` of the running batch; the last one takes its place."""
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last

    def newest(self) -> Request | None:
        """Whom to preempt."""
        return max([*self.running, *([self.reading] if self.reading else [])], key=lambda r: r.number, default=None)

    def _fits(self, request: Request) -> bool:
        if len(self.running) >= self.max_batch:
            return False
        if self.arena.ceiling is None or not self.running:
            return True
        steps = self.sizes.step * len(self.running)
        if request.cache is not None:
            needed = request.cache.parked_bytes + self.sizes.step
        else:
            prompt = len(request.prompt)
            needed = max(self.sizes.peak(prompt), self.sizes.most(prompt, len(request.tokens)))
        return self.arena.bytes + needed + steps <= self.arena.ceiling
