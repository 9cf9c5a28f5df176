"""A context and its questions in a model's tokens, cut where a cache may be compressed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add

from transformers import PreTrainedTokenizerBase

from ..generation import chat_texts

_CONTEXT = "⟪kvarn:context⟫"  # stands where the context ends


@dataclass(frozen=True)
class Prompt:
    """Tokens of a context and of the questions about it, each up to where its answer begins: ``turns`` follow one
    another, ``requests`` follow the context, each on its own (the first of both is the same). ``references``: each
    turn's first right answer. The pieces are tokenized one by one, so that the tokens are the same whether a cache
    reads them in one pass or in several."""

    context: list[int]
    turns: list[list[int]]
    requests: list[list[int]]
    references: list[list[int]]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        context: str,
        questions: Sequence[tuple[str, str]],
        references: Sequence[str],
    ) -> "Prompt":
        """``questions``: each with the beginning of its answer. With the tokenizer's chat template, the context stands
        before the first question in the user's turn; without one, everything is plain text."""
        asked, prefixes = [question for question, _ in questions], [prefix for _, prefix in questions]
        if tokenizer.chat_template:
            head, turns = _chat(tokenizer, asked)
            requests = [_chat(tokenizer, [question])[1][0] for question in asked]
            before = tokenizer(head + context, add_special_tokens=False).input_ids
        else:
            turns = requests = [f"\n\n{question}\n" for question in asked]
            before = tokenizer(context).input_ids
        return cls(
            before,
            _tokens(tokenizer, map(add, turns, prefixes)),
            _tokens(tokenizer, map(add, requests, prefixes)),
            _tokens(tokenizer, references),
        )


def _chat(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> tuple[str, list[str]]:
    """What the template writes before the context, and from its end to each answer."""
    texts = chat_texts(tokenizer, [f"{_CONTEXT}\n\n{questions[0]}", *questions[1:]])
    head, _, texts[0] = texts[0].partition(_CONTEXT)
    return head, texts


def _tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> list[list[int]]:
    return [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
