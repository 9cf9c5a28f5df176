"""A conversation kept by topics: how it is cut and clustered, what is read, and where questions go."""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import BatchEncoding

import kvarn
from conversation import CONVERSATION, QUESTIONS, TOPICS
from kvarn.episodes import _central
from kvarn.errors import RecipeError
from kvarn.generation import answer
from tiny_models import make_tiny


class Words:
    """A tokenizer of words; 1 begins a text."""

    def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> BatchEncoding:
        ids = [1] * add_special_tokens + [3 + sum(map(ord, word)) % 150 for word in text.split()]
        return BatchEncoding({"input_ids": torch.tensor([ids])})


def by_topic(texts: list[str]) -> torch.Tensor:
    """Texts of the conversation point where their topic does, and a little elsewhere."""
    words = [("basil", "rose", "garden"), ("Lisbon", "Sintra", "Alfama"), ("laptop", "drive")]
    vectors = torch.zeros(len(texts), 5)
    for row, text in zip(vectors, texts, strict=True):
        (place,) = [i for i, w in enumerate(words) if any(x in text for x in w)] or [3]
        row[place], row[4] = 2.0, len(text) / 1000
    return vectors


def episodes(recipe: str = "epicache(block=100)", budget: int = 30, **options) -> kvarn.Episodes:
    return kvarn.Episodes(make_tiny("llama"), Words(), CONVERSATION, recipe, budget, **{"encode": by_topic} | options)


def window(number: int) -> str:
    return "\n".join(f'{speaker} said, "{text}"' for speaker, text in CONVERSATION[4 * number : 4 * number + 4])


@pytest.fixture(scope="module")
def four() -> kvarn.Episodes:
    return episodes(excerpts=1, before="A talk.\n")


def test_topics_are_those_of_the_conversation(four) -> None:
    assert len(four.caches) == len(four.texts) == len(four.centres) == 4
    assert len(set(four.texts)) == 4
    vectors = normalize(by_topic([window(i) for i in range(8)]), dim=-1)
    topics = {}
    for question, _, name in QUESTIONS:
        topics.setdefault(name, set()).add(four.topic(question))
    assert sorted(topic for (topic,) in topics.values()) == [0, 1, 2, 3]
    for name, (topic,) in topics.items():
        mine = [TOPICS.index(name), TOPICS.index(name) + 4]
        centre = vectors[mine].mean(0)
        torch.testing.assert_close(four.centres[topic], centre)
        assert four.texts[topic] in map(window, mine)
    whole = episodes(excerpts=2)
    assert sorted(whole.texts) == sorted(f"{window(i)}\n{window(i + 4)}" for i in range(4))


def test_the_windows_closest_to_a_centre_score_in_their_own_order() -> None:
    vectors = normalize(torch.tensor([[1.0, 0.9], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3], [1.0, 0.2]]), dim=-1)
    members = torch.tensor([True, True, False, True, True])
    assert _central(vectors, members, torch.tensor([1.0, 0.22]), 2) == [3, 4]
    assert _central(vectors, members, torch.tensor([1.0, 0.22]), 9) == [0, 1, 3, 4]


def test_each_cache_has_read_all_and_holds_its_budget(four) -> None:
    text = "A talk.\n" + "\n".join(f'{speaker} said, "{said}"' for speaker, said in CONVERSATION)
    assert torch.equal(four.ids, Words()(text, add_special_tokens=False).input_ids)
    for cache, report, text in zip(four.caches, four.reports(), four.texts, strict=True):
        assert report.tokens == [four.ids.shape[1]]
        assert [sum(layer[0]) for layer in report.entries] == [60] * 4
        scoring = "\n\nThe part of the conversation above that is about this:\n" + text
        assert torch.equal(cache.text, Words()(scoring, add_special_tokens=False).input_ids[0])
    kept = [str(cache._groups[0].store.read_columns(slice(0, 2))["position"].tolist()) for cache in four.caches]
    assert len(set(kept)) == 4


def test_questions_leave_episodes_as_they_were(four) -> None:
    before = [report.to_dict() for report in four.reports()]
    question, _, _ = QUESTIONS[0]
    first = answer(four.model, four.route(question), Words()(question).input_ids[0].tolist(), 5)
    cache = four.route(question)
    assert answer(four.model, cache, Words()(question).input_ids[0].tolist(), 5).tokens == first.tokens
    assert cache.report().tokens[0] == four.ids.shape[1] + len(question.split()) + 1 + 4
    assert [sum(layer[0]) for layer in cache.report().entries] == [60 + 2 * (len(question.split()) + 5)] * 4
    del cache
    after = [report.to_dict() for report in four.reports()]
    for report in (*before, *after):
        report.pop("peak_bytes"), report.pop("reserved_bytes")
    assert before == after


def test_generate_goes_on_from_an_episode(four) -> None:
    question = QUESTIONS[3][0]
    ids = torch.cat([four.ids, Words()(question, add_special_tokens=False).input_ids], 1)
    cache = four.route(question)
    out = four.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    assert out.shape[1] == ids.shape[1] + 4
    assert cache.get_seq_length() == ids.shape[1] + 3


def test_episodes_that_wait_on_the_host_answer_the_same(four) -> None:
    waiting = episodes(excerpts=1, before="A talk.\n", on_host=True)
    assert sum(report.bytes > 10_000 for report in waiting.reports()) == 1
    assert waiting.reports()[0].peak_bytes < 0.5 * four.reports()[0].peak_bytes
    for question, _, _ in QUESTIONS[::3]:
        tokens = Words()(question).input_ids[0].tolist()
        (own, other) = (answer(talk.model, talk.route(question), tokens, 4).tokens for talk in (four, waiting))
        assert own == other
        assert sum(report.bytes > 10_000 for report in waiting.reports()) == 1


def test_more_of_the_conversation() -> None:
    talk = episodes(count=2)
    tokens = talk.ids.shape[1]
    talk.extend([("Ann", "The slugs are back."), ("Bob", "Oh no.")])
    added = 10  # Ann said, "The slugs are back." Bob said, "Oh no."
    assert talk.ids.shape[1] == tokens + added
    assert all(report.tokens == [tokens + added] for report in talk.reports())
    assert all(sum(layer[0]) == 60 for report in talk.reports() for layer in report.entries)


def test_fewer_windows_than_topics_and_very_long_utterances() -> None:
    seen = []

    def encode(texts):
        seen.append(list(texts))
        return by_topic(texts)

    speech = "This sentence is about the garden. " * 20 + "Oh. "
    model = make_tiny("llama")
    talk = kvarn.Episodes(model, Words(), [("Ann", speech)], "epicache", 60, window=10, encode=encode)
    assert len(talk.caches) == 1
    line = 'Ann said, "This sentence is about the garden."'
    assert seen[0] == ["\n".join([line] * 10)] * 2
    assert talk.ids.shape[1] == len(f'Ann said, "{speech}"'.split()) + 1


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="scored by a text, such as epicache, not snapkv"):
        episodes("snapkv")
    with pytest.raises(RecipeError, match="at least 1"):
        episodes(count=0)
    with pytest.raises(RecipeError, match="something that was said"):
        kvarn.Episodes(make_tiny("llama"), Words(), [])


@torch.no_grad()
def test_the_topic_of_a_question_answers_it_better_than_others_do(smollm2) -> None:
    """By the answers' log-likelihood on SmolLM2, with a topic's most central window only."""
    model, tokenizer = smollm2
    about = [i for i in range(8) if TOPICS[i % 4] in ("travel", "music")]
    said = [utterance for i in about for utterance in CONVERSATION[4 * i : 4 * i + 4]]
    talk = kvarn.Episodes(model, tokenizer, said, "epicache(block=128)", 48, count=2, excerpts=1)
    blocks = kvarn.Cache(model, "snapkv(window=16)", 48, block=128)
    model.base_model(talk.ids, past_key_values=blocks)

    def loss(cache: kvarn.Cache, question: str, reply: str) -> float:
        asked, expected = (
            tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            for text in (f"\n\nQuestion: {question}\nAnswer:", f" {reply}")
        )
        logits = model(torch.cat([asked, expected], 1), past_key_values=cache.fork(bounded=False)).logits
        chosen = logits[0, asked.shape[1] - 1 : -1].log_softmax(-1).gather(1, expected[0, :, None])
        return -float(chosen.mean())

    question, reply, _ = QUESTIONS[6]
    topic = talk.topic(question)
    losses = [loss(cache, question, reply) for cache in (talk.cache(topic), talk.cache(1 - topic), blocks)]
    assert losses[0] < min(losses[1:]) - 1, losses
