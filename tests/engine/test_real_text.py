"""SmolLM2 with real prompts: tokens of ``generate``, text of the tokenizer, stop strings."""

import pytest

import kvarn
from kvarn import Engine, Sampling
from kvarn.errors import Refused

PROMPTS = [
    "The three primary colours are",
    "Write a list of animals:\n- a cat\n- a dog\n-",
    "Grüße aus Köln! Ein Satz auf Deutsch mit Umlauten: Der Bär",
]


@pytest.mark.slow
def test_real_prompts(smollm2):
    model, tokenizer = smollm2
    engine = Engine(model, "snapkv", 0.9, tokenizer=tokenizer)
    answers = engine.generate(PROMPTS, Sampling(max_tokens=16))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        cache = kvarn.Cache(model, "snapkv", 0.9)
        own = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
        assert answer.tokens == own[0, inputs.input_ids.shape[1] :].tolist()
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    # A stop string that begins and ends within tokens.
    text = answers[1].text
    borders = {len(tokenizer.decode(answers[1].tokens[:n])) for n in range(1, 16)}
    first, last = sorted(set(range(2, len(text))) - borders)[:8:7]
    stop = text[first:last]
    events = list(engine.stream(PROMPTS[1], Sampling(max_tokens=16, stop=("zebras", stop))))
    assert events[-1].finished == "stop"
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert len(events) < 16


def test_text_needs_a_tokenizer(tiny_model):
    with pytest.raises(Refused, match="tokenizer"):
        Engine(tiny_model).add("text", Sampling())
