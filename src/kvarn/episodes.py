"""A long conversation kept as several small caches, one a topic; a question goes to the one that is closest to it.

EpiCache (arXiv 2509.17396). The conversation is cut into windows of utterances, whose embeddings are clustered. For
each cluster the whole conversation is read under the budget, scored by the windows in the middle of the cluster.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .budgets import Budget
from .cache import Cache
from .clustering import kmeans
from .errors import RecipeError
from .memory import Arena
from .methods import Method
from .recipe import Recipe
from .report import Report

Conversation = Sequence[tuple[str, str]]  # who said what
Encoder = Callable[[Sequence[str]], Tensor]  # texts -> [n, d]

INSTRUCTION = "\n\nThe part of the conversation above that is about this:\n"
_PAGE_SIZE = 16
_LONGEST, _SHORTEST = 500, 10  # characters of an utterance, and of a piece of one, where windows are cut


class Episodes:
    """The topics of a conversation, each with a cache of all of it in which the topic comes first.

    ``conversation``: pairs of a speaker and what was said. ``recipe`` and ``budget``: as for ``kvarn.Cache``; the
    budget is that of each cache, and the recipe one that is scored by a text (``epicache``, alone or with others).
    ``count`` topics; ``window`` utterances are embedded together; the ``excerpts`` windows closest to a cluster's
    centre score for it. ``before`` is a text that the conversation follows (a system prompt, the beginning of a chat
    template), ``instruction`` what stands between it and the windows that score. ``encode``: the embedding; None: the
    mean of the model's last hidden states. ``on_host``: only one cache is on the device at a time, the others wait in
    the host's memory.

    ``ids`` (int64 [1, n]) are all tokens that were read, ``texts`` the windows that score for each topic, ``centres``
    ([count, d]) those of the clusters, ``caches`` the caches. There are fewer topics where there are fewer windows.
    Raises RecipeError, and what ``Cache`` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        recipe: str | Method | Recipe = "epicache",
        budget: Budget = None,
        *,
        count: int = 4,
        window: int = 4,
        excerpts: int = 8,
        before: str = "",
        instruction: str = INSTRUCTION,
        encode: Encoder | None = None,
        on_host: bool = False,
    ):
        parsed = Recipe.parse(recipe)
        if parsed.tail is None:
            raise RecipeError(f"episodes need a recipe that is scored by a text, such as epicache, not {parsed}")
        if min(count, window, excerpts) < 1 or not conversation:
            raise RecipeError("episodes need something that was said, and count, window and excerpts of at least 1")
        self.model, self.tokenizer, self.on_host = model, tokenizer, on_host
        self.encode = encode or _mean_states(model, tokenizer)
        windows = _windows(conversation, window)
        vectors = normalize(self.encode(windows).float().cpu(), dim=-1)
        clusters = kmeans(vectors, count)
        self.centres = clusters.centres
        self.texts = [
            "\n".join(windows[i] for i in _central(vectors, clusters.of == topic, centre, excerpts))
            for topic, centre in enumerate(self.centres)
        ]
        self.ids = self._tokens(before + _rendered(conversation), add_special_tokens=not before)
        scoring = [self._tokens(instruction + text, add_special_tokens=False)[0] for text in self.texts]
        arena = Arena(model.device, _PAGE_SIZE)
        self.caches = [Cache(model, parsed, budget, text=text, arena=arena) for text in scoring]
        self._read(self.ids)

    def topic(self, question: str) -> int:
        """The number of the topic that is closest to ``question``."""
        vector = normalize(self.encode([question]).float().cpu(), dim=-1)[0]
        return int((normalize(self.centres, dim=-1) @ vector).argmax())

    def route(self, question: str) -> Cache:
        """A fork of the cache of the closest topic, which keeps all that comes to it: the question and the answer. The
        episode's own cache stays as it is. Its next token is the one after ``ids``."""
        return self.cache(self.topic(question)).fork(bounded=False)

    def cache(self, topic: int) -> Cache:
        """The cache of a topic, on the device."""
        for number, cache in enumerate(self.caches):
            if self.on_host and number != topic:
                cache.to_host()
        self.caches[topic].to_device()
        return self.caches[topic]

    def extend(self, conversation: Conversation) -> None:
        """Reads more of the conversation into all caches, under their budgets; the topics stay as they are."""
        new = self._tokens("\n" + _rendered(conversation), add_special_tokens=False)
        self.ids = torch.cat([self.ids, new], 1)
        self._read(new)

    def reports(self) -> list[Report]:
        """What each cache holds on the device. They share their pools, so a peak is that of all together."""
        return [cache.report() for cache in self.caches]

    @torch.no_grad()
    def _read(self, ids: Tensor) -> None:
        for topic in range(len(self.caches)):
            self.model.base_model(input_ids=ids.to(self.model.device), past_key_values=self.cache(topic))

    def _tokens(self, text: str, add_special_tokens: bool) -> Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens, verbose=False).input_ids


def _rendered(conversation: Conversation) -> str:
    return "\n".join(f'{speaker} said, "{text}"' for speaker, text in conversation)


def _windows(conversation: Conversation, size: int) -> list[str]:
    """Windows of ``size`` utterances each, of which very long ones are cut into sentences."""
    pieces = [(speaker, piece) for speaker, text in conversation for piece in _pieces(text)]
    return [_rendered(pieces[first : first + size]) for first in range(0, len(pieces), size)]


def _pieces(text: str) -> list[str]:
    if len(text) <= _LONGEST:
        return [text]
    sentences = [piece for piece in re.split(r"(?<=[.!?])\s+", text) if len(piece) > _SHORTEST]
    return sentences or [text]


def _central(vectors: Tensor, members: Tensor, centre: Tensor, count: int) -> list[int]:
    """The ``count`` members ([n] bool) whose cosine to the centre is largest, in their own order."""
    alike = (vectors @ normalize(centre, dim=0)).masked_fill(~members, -torch.inf)
    best = alike.argsort(descending=True, stable=True)[: min(count, int(members.sum()))]
    return sorted(best.tolist())


def _mean_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The mean of the last hidden states over the tokens of a text."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        found = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids.to(model.device)
            found.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float().mean(0))
        return torch.stack(found)

    return encode
