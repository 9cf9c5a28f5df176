import pytest

from kvarn.errors import Unsupported
from kvarn.gguf_tokenizer import build_tokenizer, stop_tokens

CONTROL, NORMAL, USER_DEFINED, BYTE = 3, 1, 4, 6


def sentencepiece(**more: object) -> dict[str, object]:
    # "▁ab" scores better than "bc", so "▁abc" is "▁ab" + "c" although a Unigram model would take the longer sum.
    pieces = [
        ("<unk>", CONTROL, 0.0),
        ("<bos>", CONTROL, 0.0),
        ("<turn>", CONTROL, 0.0),
        ("  ", USER_DEFINED, -1000.0),
        *[(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)],
        ("▁a", NORMAL, -1.0),
        ("▁ab", NORMAL, -2.0),
        ("bc", NORMAL, -3.0),
        *[(letter, NORMAL, -100.0) for letter in "▁abc"],
    ]
    tokens, kinds, scores = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": list(kinds),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


def byte_level(rule: str, merges: list[str]) -> dict[str, object]:
    letters = [*"abcé123.'", "Ġ", "Ċ", "Ã", "©"]
    tokens = ["<eos>", *letters, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }


def test_sentencepiece_merges_by_score():
    tokenizer = build_tokenizer(sentencepiece(add_space_prefix=False))
    assert tokenizer.tokenize(" abc abc") == ["▁ab", "c", "▁ab", "c"]
    assert tokenizer.tokenize("bc") == ["bc"]


def test_sentencepiece_special_tokens_match_whole():
    tokenizer = build_tokenizer(sentencepiece(add_space_prefix=False))
    assert tokenizer.tokenize("a<turn>bc  a") == ["a", "<turn>", "bc", "  ", "a"]


def test_sentencepiece_round_trip_with_bytes_and_bos():
    tokenizer = build_tokenizer(sentencepiece())
    text = "ab é😀  c"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_added_when_the_file_says_so(adds):
    ids = build_tokenizer(sentencepiece(add_bos_token=adds)).encode("a")
    assert (ids[0] == 1) is adds


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", ["ab", "Ċ", "Ċ", "123", ".", "Ġ", "Ġ1"]),
        ("smollm", ["ab", "ĊĊ", "1", "2", "3", ".", "ĠĠ", "1"]),
        ("llama-bpe", ["ab", "ĊĊ", "123", ".", "Ġ", "Ġ", "1"]),
        ("qwen2", ["ab", "ĊĊ", "1", "2", "3", ".", "Ġ", "Ġ", "1"]),
    ],
)
def test_splitting_rules(rule, expected):
    fields = byte_level(rule, ["a b", "Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "Ġ 1"])
    tokenizer = build_tokenizer(fields)
    assert tokenizer.tokenize("ab\n\n123.  1") == expected
    assert tokenizer.decode(tokenizer.encode("ab\n\n123.  1 .")) == "ab\n\n123.  1 ."


@pytest.mark.parametrize("rule", ["qwen2", "deepseek-r1-qwen"])
def test_qwen_composes_letters(rule):
    tokenizer = build_tokenizer(byte_level(rule, ["Ã ©"]))
    assert tokenizer.tokenize("e\u0301") == ["Ã©"]


def test_padding_falls_back_to_eos():
    assert build_tokenizer(byte_level("gpt-2", [])).pad_token == "<eos>"


def test_stop_tokens():
    eos, eot = {"tokenizer.ggml.eos_token_id": 7}, {"tokenizer.ggml.eot_token_id": 3}
    assert stop_tokens({}) is None
    assert stop_tokens(eos) == 7
    assert stop_tokens(eos | eot) == [3, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "of kind None"), ({"tokenizer.ggml.model": "t5"}, "of kind 't5'"), (byte_level("odd", []), "rule 'odd'")],
)
def test_unsupported(fields, message):
    with pytest.raises(Unsupported, match=message):
        build_tokenizer(fields)
