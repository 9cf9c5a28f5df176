from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvarn import Cache
from kvarn.errors import PromptTooLong, Unsupported
from kvarn.generation import answer, chat_turns, require_room
from kvarn.models import load
from tiny_chat import TEMPLATE, save_tiny_chat

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
PROMPT = list(range(40, 80))


@pytest.fixture
def tiny(tmp_path: Path) -> Pair:
    return load(save_tiny_chat(tmp_path / "tiny"), device="cpu")


def _generated(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers alone generates."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_answer_is_what_transformers_generates(tiny: Pair) -> None:
    model, _ = tiny
    expected = _generated(model, PROMPT, 12)
    cache = Cache(model)
    seen: list[int] = []
    given = answer(model, cache, PROMPT, 12, on_token=seen.append)
    assert given.tokens == seen == expected
    assert not given.finished
    assert given.pending == expected[-1:]
    assert cache.get_seq_length() == len(PROMPT) + 11
    assert given.per_token is not None
    assert given.per_token > 0


def test_answer_ends_at_the_end_token_with_nothing_pending(tiny: Pair) -> None:
    model, _ = tiny
    tokens = _generated(model, PROMPT, 12)
    end = next(token for token in tokens if token != tokens[0])
    first = tokens.index(end)
    model.generation_config.eos_token_id = [end]
    cache = Cache(model)
    given = answer(model, cache, PROMPT, 12)
    assert given.finished
    assert given.tokens == tokens[:first]
    assert given.pending == []
    assert cache.get_seq_length() == len(PROMPT) + first


def test_after_prompt_sees_a_cache_that_holds_the_prompt_alone(tiny: Pair) -> None:
    model, _ = tiny
    cache = Cache(model)
    lengths: list[int] = []
    answer(model, cache, PROMPT, 4, after_prompt=lambda: lengths.append(cache.get_seq_length()))
    assert lengths == [len(PROMPT)]


def test_turns_and_answers_together_are_the_template_of_the_conversation(tiny: Pair) -> None:
    _, tokenizer = tiny
    first, second = chat_turns(tokenizer, ["one?", "two?"], system="be brief")
    whole = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "uno"},
        {"role": "user", "content": "two?"},
    ]
    text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(first) + "uno" + tokenizer.decode(second) == text


def test_templates_that_cannot_share_a_cache_are_refused(tmp_path: Path) -> None:
    _, bare = load(save_tiny_chat(tmp_path / "bare", template=None), device="cpu")
    with pytest.raises(Unsupported, match="no chat template"):
        chat_turns(bare, ["one?"])
    forgetful = TEMPLATE.replace("{{ message.content }}", "{{ message.content if message.role == 'user' }}")
    bare.chat_template = forgetful
    assert len(chat_turns(bare, ["one?"])) == 1
    with pytest.raises(Unsupported, match="earlier answers"):
        chat_turns(bare, ["one?", "two?"])


def test_room_is_measured_to_the_token() -> None:
    require_room(90, 10, 100)
    require_room(10**9, 10, None)
    with pytest.raises(PromptTooLong, match="are 1 more than the model's 100 positions"):
        require_room(91, 10, 100)
