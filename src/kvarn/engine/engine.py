"""Many sequences at once, within one budget of memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budgets import Budget, parse_bytes
from ..cache import Cache
from ..errors import OutOfMemory, Refused, Unsupported
from ..generation import end_tokens, require_room
from ..memory import Arena, fetched
from ..methods import Method
from ..recipe import Recipe
from .requests import Event, Output, Request
from .runner import Runner
from .sampling import Sampler, Sampling, logprobs_of
from .scheduler import Scheduler, Sizes
from .text import TextStream

Prompt = str | Sequence[int]
Sampled = tuple[Tensor, tuple[Tensor, ...] | None]
Arriving = Callable[[], Tensor]
Chosen = tuple[Arriving, tuple[Arriving, ...] | None]  # what was sampled, on its way to the host


class Engine:
    """Answers requests of different lengths together, each with the tokens that ``model.generate`` gives it alone.

    ``model``, ``recipe`` and ``budget`` as for ``Cache``; the budget is that of each sequence. ``memory``: bytes
    ("8GiB") of pages for all sequences together (None: no ceiling). ``tokenizer``: for prompts and answers as text.
    ``max_batch``: sequences that run at once. ``prefill_chunk``: tokens of a prompt in one pass (None: all), as for
    ``generate(prefill_chunk_size=…)`` with a cache that was told by ``expect``, or whole blocks where the recipe reads
    prompts in blocks; ``step_tokens``: after so many of them
    a step ends. ``preemption``: what happens to the newest sequences when memory is short: "host" moves their
    pages to the host's memory, "recompute" reads prompt and answer again later; either way nothing is lost.

    An engine is driven from one thread. Raises RecipeError, BudgetError or Unsupported as ``Cache`` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: str | Method | Recipe = "full",
        budget: Budget = None,
        *,
        memory: str | int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        page_size: int = 16,
        max_batch: int = 64,
        prefill_chunk: int | None = None,
        step_tokens: int = 2048,
        preemption: Literal["host", "recompute"] = "host",
    ):
        ceiling = parse_bytes(memory) if isinstance(memory, str) else memory
        self.model, self.tokenizer, self.budget, self.preemption = model, tokenizer, budget, preemption
        self.arena = Arena(model.device, page_size, ceiling)
        self._batch = Cache(model, recipe, budget, arena=self.arena)
        self.recipe, self.spec = self._batch.recipe, self._batch.spec
        if prefill_chunk is not None and self.recipe.propagation is not None:
            raise Unsupported(f"{self.recipe} chooses tokens of a whole prompt, so prompts cannot be read in chunks")
        self._block = self.recipe.block
        if self._block and prefill_chunk is not None:
            prefill_chunk = max(prefill_chunk // self._block, 1) * self._block
        self._chunk, self._step_tokens = prefill_chunk, step_tokens
        self._sizes = Sizes(self.recipe, self.spec, budget, page_size, self._block or prefill_chunk)
        self._scheduler = Scheduler(self.arena, self._sizes, max_batch)
        self._runner = Runner(model)
        self._ends = frozenset(end_tokens(model))
        self._vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._number = 0
        self._sampler: tuple[list[Request], Sampler] | None = None
        self._unseen: list[Event] = []  # of requests that ``generate`` or ``stream`` was not asked about
        self.preempted = 0
        """How often a request had to make room."""

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt, sampling: Sampling | None = None) -> int:
        """Takes a request and returns its number. Raises Refused, PromptTooLong, BudgetError or OutOfMemory, with the
        reason, for one that can never be answered."""
        sampling = sampling or Sampling()
        tokens = self._tokens(prompt)
        if sampling.stop and self.tokenizer is None:
            raise Refused("stop strings need a tokenizer: give the engine one, or use stop_tokens")
        require_room(len(tokens), sampling.max_tokens, self.spec.max_positions)
        most = self._sizes.most(len(tokens), sampling.max_tokens)
        if self.arena.ceiling is not None and most > self.arena.ceiling:
            raise OutOfMemory(
                f"a prompt of {len(tokens):,} tokens and an answer of {sampling.max_tokens:,} can take {most:,} bytes "
                f"with {self.recipe}, and the engine has {self.arena.ceiling:,}: give it more memory, or ask for less"
            )
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(self.model.device)
            generator.manual_seed(sampling.seed if sampling.seed is not None else int(torch.randint(2**62, ())))
        ends = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_end else self._ends)
        stream = TextStream(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
        self._number += 1
        self._scheduler.wait(Request(self._number, tokens, sampling, ends, stream, generator))
        return self._number

    def abort(self, number: int) -> bool:
        """Drops a request, whatever it is doing, and gives its pages back; False where there is none of that number."""
        request = self._found(number)
        if request is None:
            return False
        self._drop(request)
        return True

    @property
    def busy(self) -> bool:
        """Whether requests are not answered yet."""
        return not self._scheduler.idle

    @property
    def running(self) -> int:
        """Sequences that decode."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, preempted ones with them."""
        return len(self._scheduler.waiting)

    def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Output]:
        """Answers all ``prompts`` (with one sampling for all or one for each) and returns the answers in their order.

        Raises what ``add`` raises, before anything is computed."""
        prompts = list(prompts)
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        numbers: list[int] = []
        try:
            for prompt, its in zip(prompts, each, strict=True):
                numbers.append(self.add(prompt, its))
        except BaseException:
            for number in numbers:
                self.abort(number)
            raise
        events: dict[int, list[Event]] = {number: [] for number in numbers}
        others: list[Event] = []
        while any(not mine or not mine[-1].finished for mine in events.values()):
            for event in self.step():
                events.get(event.request, others).append(event)
        self._unseen += others
        return [_output(events[number]) for number in numbers]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Event]:
        """The events of one request as they come."""
        number = self.add(prompt, sampling)
        try:
            while self._found(number):
                events = self.step()
                self._unseen += [event for event in events if event.request != number]
                yield from (event for event in events if event.request == number)
        finally:
            self.abort(number)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One token for every sequence that runs, and prompts up to ``step_tokens`` tokens: what came of it."""
        unseen, self._unseen = self._unseen, []
        return [*unseen, *self._decode(), *self._read()]

    def _decode(self) -> list[Event]:
        scheduler, batch = self._scheduler, self._batch
        events = [] if batch.opened else self._with_room(batch.open)
        rows = list(scheduler.running)
        if not rows:
            return events
        new = [row for row, request in enumerate(rows) if not request.replays]
        chosen_for = [rows[row] for row in new]
        sampler = self._sampler_for(chosen_for)
        logits = self._runner.decode(batch, [request.tokens[request.fed] for request in rows])
        for request in rows:
            request.fed += 1
        sampled = sampler(logits if len(new) == len(rows) else logits[new]) if sampler else None
        # The host settles this step and prepares the next while the device computes; what was chosen is read only then,
        # but sent before, so that it need not wait for what is prepared.
        chosen = _fetched(sampled)
        room = True
        try:
            batch.settle()
            if not scheduler.waiting and not scheduler.reading:
                batch.open()
                if sampled is not None and len(new) == len(rows):
                    self._runner.prepare(sampled[0])
        except OutOfMemory:
            room = False
        events += self._taken(chosen_for, chosen)
        # Those that have ended have given their pages back.
        return events if room else events + self._with_room(batch.settle)

    def _read(self) -> list[Event]:
        """Reads prompts, and takes those that are read into the running batch."""
        events: list[Event] = []
        left = self._step_tokens
        while left > 0 and (request := self._scheduler.admit()):
            try:
                if request.reading:
                    left -= self._read_chunk(request, events)
                else:
                    self._restore(request)
            except OutOfMemory:
                events += self._make_room()
                break
            except BaseException:
                self._drop(request)
                raise
        return events

    def _read_chunk(self, request: Request, events: list[Event]) -> int:
        """Reads the next tokens of a prompt; how many."""
        if request.cache is None:
            request.cache = self._batch.empty()
            request.cache.expect(len(request.prompt))
        left = len(request.prompt) - request.read
        count = min(self._chunk or left, left)
        if self._block:  # the cache cuts prompts into blocks from their end on: chunks are whole blocks
            count = (left - 1) % (self._chunk or left) + 1
        logits = self._runner.read(request.cache, request.prompt[request.read : request.read + count])
        request.read += count
        if not request.reading:
            if not request.tokens:
                events += self._taken([request], _fetched(self._sampler_of([request])(logits)))
            if request is self._scheduler.reading:  # its first token was not its last
                self._join(request)
        return count

    def _restore(self, request: Request) -> None:
        """Brings a sequence back that was moved to the host."""
        assert request.cache is not None
        request.cache.to_device()
        request.cache.settle()
        self._join(request)

    def _join(self, request: Request) -> None:
        assert request.cache is not None
        self._batch.retract()
        self._batch.join(request.cache)
        self._runner.capture(self._batch, self._scheduler.max_batch)
        request.cache = None
        self._scheduler.start(request)

    # -- tokens -------------------------------------------------------------------------------------------------

    def _sampler_of(self, requests: list[Request]) -> Sampler:
        return Sampler(requests, self._vocabulary, self.model.device)

    def _sampler_for(self, requests: list[Request]) -> Sampler | None:
        """The sampler of the step before, where it was for the same requests."""
        if self._sampler is None or self._sampler[0] != requests:
            self._sampler = requests, self._sampler_of(requests)
        return self._sampler[1] if requests else None

    def _taken(self, requests: list[Request], chosen: Chosen | None) -> list[Event]:
        """Gives each request the token that was chosen for it."""
        if chosen is None:
            return []
        tokens = chosen[0]().tolist()
        found = None if chosen[1] is None else tuple(each() for each in chosen[1])
        events = []
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            events.append(request.take(token, logprobs_of(row, request.sampling, found)))
            if events[-1].finished:
                self._drop(request)
        return events

    # -- memory -------------------------------------------------------------------------------------------------

    def _with_room(self, act: Callable[[], None]) -> list[Event]:
        """Does what needs pages for the running batch, preempting the newest while there are too few."""
        events: list[Event] = []
        while self._scheduler.running:
            try:
                act()
                break
            except OutOfMemory:
                events += self._make_room()
        return events

    def _make_room(self) -> list[Event]:
        """Preempts the newest request; where it is alone, it cannot be held at all and ends."""
        scheduler, request = self._scheduler, self._scheduler.newest()
        assert request is not None
        if len(scheduler.running) + (scheduler.reading is not None) > 1:
            self._preempt(request)
            return []
        self._drop(request)
        return [Event(request.number, [], request.stream.finish() if request.stream else "", None, "memory")]

    def _preempt(self, request: Request) -> None:
        self.preempted += 1
        scheduler = self._scheduler
        if scheduler.reading is request:
            scheduler.reading = None
        else:
            row = scheduler.running.index(request)
            self._batch.retract()
            request.cache = self._batch.leave(row)
            scheduler.stop(row)
        if request.cache is not None and not request.reading and self.preemption == "host":
            request.cache.to_host()
        else:
            request.forget()
        scheduler.wait(request)

    def _drop(self, request: Request) -> None:
        """Gives back all that a request holds, and forgets it."""
        scheduler = self._scheduler
        if request in scheduler.running:
            row = scheduler.running.index(request)
            self._batch.leave(row).free()
            scheduler.stop(row)
        elif scheduler.reading is request:
            scheduler.reading = None
        elif request in scheduler.waiting:
            scheduler.waiting.remove(request)
        request.forget()

    def _found(self, number: int) -> Request | None:
        scheduler = self._scheduler
        every = [*scheduler.waiting, *scheduler.running, *([scheduler.reading] if scheduler.reading else [])]
        return next((request for request in every if request.number == number), None)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise Refused("a prompt as text needs a tokenizer: give the engine one, or token ids")
            tokens = self.tokenizer(prompt).input_ids
        else:
            tokens = [int(token) for token in prompt]
        if not tokens or not all(0 <= token < self._vocabulary for token in tokens):
            raise Refused(f"a prompt has at least one token, and all below the vocabulary's {self._vocabulary:,}")
        return tokens


def _fetched(sampled: Sampled | None) -> Chosen | None:
    if sampled is None:
        return None
    tokens, found = sampled
    return fetched(tokens), None if found is None else tuple(fetched(each) for each in found)


def _output(events: list[Event]) -> Output:
    tokens = [token for event in events for token in event.tokens]
    logprobs = [each for event in events if event.logprobs for each in event.logprobs]
    finished = events[-1].finished
    assert finished is not None
    return Output(tokens, "".join(event.text for event in events), logprobs or None, finished)
