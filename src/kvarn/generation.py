"""Greedy answers on a cache, timed; chat prompts of several turns cut into what each turn adds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import Cache
from .errors import PromptTooLong, Unsupported

_ANSWER = "⟪kvarn:answer⟫"  # stands for an answer that is not known yet


@dataclass(frozen=True)
class Answer:
    """Tokens that the model chose. ``finished``: it ended the answer itself. ``pending``: chosen tokens that the cache
    has not seen yet. Times are in seconds; ``per_token`` is None where no token came after the first."""

    tokens: list[int]
    finished: bool
    pending: list[int]
    to_first_token: float
    per_token: float | None


def chat_texts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], system: str | None = None) -> list[str]:
    """The text that each user turn adds: what the chat template writes from the end of the last answer to the
    beginning of the next. Raises Unsupported where there is no template or it drops turns."""
    if not tokenizer.chat_template:
        raise Unsupported("this model's tokenizer has no chat template; use a model that is tuned for chat")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    turns = text.split(_ANSWER)
    if len(turns) != len(questions):
        raise Unsupported("this model's chat template changes earlier answers, so turns cannot share a cache")
    return turns


def chat_turns(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], system: str | None = None
) -> list[list[int]]:
    """The tokens that each user turn adds to the cache; raises Unsupported as ``chat_texts`` does."""
    turns = chat_texts(tokenizer, questions, system)
    return [tokenizer(turn, add_special_tokens=False).input_ids for turn in turns]


def require_room(tokens: int, answers: int, limit: int | None) -> None:
    """Raises PromptTooLong where ``tokens`` of prompts and ``answers`` of answers are beyond the model's positions."""
    if limit is not None and tokens + answers > limit:
        raise PromptTooLong(
            f"{tokens:,} tokens of prompt and up to {answers:,} of answer are {tokens + answers - limit:,} more than "
            f"the model's {limit:,} positions"
        )


@torch.no_grad()
def next_logits(model: PreTrainedModel, cache: Cache, tokens: Sequence[int]) -> Tensor:
    """One pass of ``tokens``: the logits of what comes next, [vocabulary]."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]


def answer(
    model: PreTrainedModel,
    cache: Cache,
    prompt: Sequence[int],
    most: int,
    on_token: Callable[[int], None] = lambda token: None,
    after_prompt: Callable[[], None] = lambda: None,
) -> Answer:
    """Reads ``prompt`` into the cache and answers greedily with at most ``most`` tokens.

    ``after_prompt`` is called when the cache holds the prompt and nothing of the answer; its time is not counted.
    """
    start = time.perf_counter()
    token = int(next_logits(model, cache, prompt).argmax())
    to_first_token = time.perf_counter() - start
    after_prompt()
    ends, tokens = end_tokens(model), []
    start = time.perf_counter()
    while token not in ends:
        tokens.append(token)
        on_token(token)
        if len(tokens) == most:
            break
        token = int(next_logits(model, cache, [token]).argmax())
    finished = token in ends
    passes = len(tokens) if finished else len(tokens) - 1
    per_token = (time.perf_counter() - start) / passes if passes else None
    return Answer(tokens, finished, [] if finished else tokens[-1:], to_first_token, per_token)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens with which the model ends an answer."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
