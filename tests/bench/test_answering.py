import random

import pytest
from fake_subject import FakeSubject
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn.bench.answering import Answering
from kvarn.bench.records import Record
from kvarn.bench.subjects import KvarnSubject, Subject
from kvarn.bench.tasks import Example, Materials, Setting, Task, Turn

Chat = tuple[PreTrainedModel, PreTrainedTokenizerBase]
EXAMPLE = Example(
    "The mill has 42 sacks of rye.",
    (Turn("How many?", ("42",), "contains_all", 3, " It has"), Turn("Of what?", ("rye", "oats"), "contains_all", 4)),
)


def _one(materials: Materials, length: int, rng: random.Random) -> Example:
    return EXAMPLE


def _measure(tokenizer: PreTrainedTokenizerBase, setting: Setting, subject: Subject, ends: set[int]) -> Record:
    task = Task("one", "test", _one, (setting,))
    return Answering(task, setting, 0, 128, 0, Materials(tokenizer), frozenset(ends)).prepared()(subject)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


HEAD = "<|im_start|>user\nThe mill has 42 sacks of rye."
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
ASK = [
    f"\n\nHow many?{ANSWER} It has",
    f"<|im_end|>\n<|im_start|>user\nOf what?{ANSWER}",
    f"\n\nOf what?{ANSWER}",
]


def test_the_prompt_is_cut_where_the_context_ends(tiny_chat: Chat) -> None:
    tokenizer = tiny_chat[1]
    prompt = EXAMPLE.prompt(tokenizer)
    assert prompt.context == _ids(tokenizer, HEAD)
    assert prompt.turns == [_ids(tokenizer, text) for text in ASK[:2]]
    assert prompt.requests == [_ids(tokenizer, text) for text in (ASK[0], ASK[2])]
    assert prompt.references == [_ids(tokenizer, "42"), _ids(tokenizer, "rye")]
    assert EXAMPLE.room(tokenizer) == len(prompt.context) + sum(map(len, prompt.turns)) + 3 + 4


def test_without_a_chat_template_everything_is_plain_text(tiny_chat: Chat) -> None:
    tokenizer = tiny_chat[1]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        prompt = EXAMPLE.prompt(tokenizer)
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(prompt.context + prompt.turns[0]) == "The mill has 42 sacks of rye.\n\nHow many?\n It has"


@pytest.mark.parametrize(
    ("setting", "passes"),
    [
        ("aware", [["context", "first"], ["context", "alone"]]),
        ("multi-request", [["context", "first"], ["context", "alone"]]),
        ("multi-turn", [["context", "first"], ["context", "first", "42", "second"]]),
    ],
)
def test_each_setting_reads_what_it_should(tiny_chat: Chat, setting: Setting, passes: list) -> None:
    """What each answer follows."""
    tokenizer = tiny_chat[1]
    texts = {"context": HEAD, "first": ASK[0], "second": ASK[1], "alone": ASK[2], "42": "42"}
    pieces = {name: _ids(tokenizer, text) for name, text in texts.items()}
    assert pieces["second"][-1] == pieces["alone"][-1]
    subject = FakeSubject({pieces["first"][-1]: 5, pieces["second"][-1]: 6, 5: 9, 6: 9})
    record = _measure(tokenizer, setting, subject, {9})
    answered = [read[:-1] for read in subject.reads if read[-1] in (5, 6)]
    assert answered == [[token for name in turn for token in pieces[name]] for turn in passes]
    assert [turn["tokens"] for turn in record["turns"]] == [1, 1]
    first = len(pieces["first"]) if setting == "aware" else 0
    assert record["held"]["bytes"] == len(pieces["context"]) + first
    assert subject.all_closed_once()


def test_answers_end_at_an_end_or_at_their_most(tiny_chat: Chat) -> None:
    tokenizer = tiny_chat[1]
    ids = {digit: _ids(tokenizer, digit)[0] for digit in "42"}
    ask = EXAMPLE.prompt(tokenizer).turns
    subject = FakeSubject({ask[0][-1]: ids["4"], ids["4"]: ids["2"], ids["2"]: ids["4"], ask[1][-1]: 399})
    record = _measure(tokenizer, "agnostic", subject, {399})
    assert [turn["answer"] for turn in record["turns"]] == ["424", ""]
    assert [turn["score"] for turn in record["turns"]] == [1.0, 0.0]
    assert record["score"] == 0.5


def test_multi_turn_with_the_full_cache_is_one_long_prompt(tiny_chat: Chat) -> None:
    """SCBench's first check: the dense cache in turns answers as it does after one prompt with all that came before."""
    model, tokenizer = tiny_chat
    turns = _measure(tokenizer, "multi-turn", KvarnSubject(model, "full"), set())["turns"]
    prompt = EXAMPLE.prompt(tokenizer)
    merged = Example(EXAMPLE.context, (Turn("How many?", ("42",), "contains_all", 4, f" It has42{ASK[1]}"),))
    assert merged.prompt(tokenizer).turns[0] == prompt.turns[0] + prompt.references[0] + prompt.turns[1]
    task = Task("merged", "test", lambda m, n, r: merged)
    alone = Answering(task, "aware", 0, 128, 0, Materials(tokenizer), frozenset()).prepared()
    assert alone(KvarnSubject(model, "full"))["turns"][0]["answer"] == turns[1]["answer"] != ""


def test_order_of_requests_does_not_matter(tiny_chat: Chat) -> None:
    model, tokenizer = tiny_chat
    subject = KvarnSubject(model, "snapkv(window=4)", 0.6)
    one = _measure(tokenizer, "multi-request", subject, set())
    swapped = Example(EXAMPLE.context, EXAMPLE.turns[::-1])
    task = Task("swapped", "test", lambda m, n, r: swapped, ("multi-request",))
    case = Answering(task, "multi-request", 0, 128, 0, Materials(tokenizer), frozenset())
    assert swapped.prompt(tokenizer).context == EXAMPLE.prompt(tokenizer).context
    assert case.prepared()(subject)["held"] == one["held"]
