"""Text as tokens come: whole characters, and nothing of what a stop string cuts off."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.engine.text import TextStream


class Bytes:
    """A tokenizer whose tokens are pieces of UTF-8, by default single bytes; token 256 is special."""

    def __init__(self, pieces: tuple[bytes, ...] = ()):
        self.pieces = pieces

    def encode(self, text: str) -> list[int]:
        data, tokens = text.encode(), []
        while data:
            piece = next((p for p in self.pieces if data.startswith(p)), data[:1])
            tokens.append(257 + self.pieces.index(piece) if piece in self.pieces else piece[0])
            data = data[len(piece) :]
        return tokens

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        parts = [bytes([t]) if t < 256 else self.pieces[t - 257] for t in tokens if t != 256]
        return b"".join(parts).decode(errors="replace")


def streamed(tokenizer, tokens, stop=()):
    stream = TextStream(tokenizer, stop)
    deltas = []
    for token in tokens:
        deltas.append(stream.push(token))
        if stream.stopped:
            break
    return [*deltas, stream.finish()], stream.stopped


texts = st.text(alphabet="ab é€😀\n", max_size=25)
pieces = st.sampled_from([(), (b"ab", b"a "), ("é".encode() + b"a", b"\xe2\x82")])


@settings(max_examples=150)
@given(texts, pieces)
def test_the_deltas_are_the_text(text, made_of):
    tokenizer = Bytes(made_of)
    deltas, _ = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text
    assert not any("�" in delta for delta in deltas)


@settings(max_examples=200)
@given(texts, pieces, st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=2))
def test_the_text_ends_before_a_stop_string(text, made_of, stop):
    """Token by token nothing is shown that a later token could take back."""
    tokenizer = Bytes(made_of)
    deltas, stopped = streamed(tokenizer, tokenizer.encode(text), stop)
    found = [place for s in stop if (place := text.find(s)) >= 0]
    assert stopped == bool(found)
    got = "".join(deltas)
    if not found:
        assert got == text
    else:
        assert text.startswith(got)
        assert not any(s in got for s in stop)
        # Of several stop strings the one that is complete first counts.
        first = min(text.find(s) + len(s) for s in stop if s in text)
        assert len(got) <= first


def test_a_stop_string_across_tokens_and_what_comes_before_it():
    tokenizer = Bytes((b"abc", b" END", b"E", b"ND"))
    tokens = tokenizer.encode("abcabc END more")
    deltas, stopped = streamed(tokenizer, tokens, ["c E"])
    assert ("".join(deltas), stopped) == ("abcab", True)
    deltas, stopped = streamed(Bytes(), Bytes().encode("xxabxab."), ["ab."])
    assert deltas[:5] == ["x", "x", "", "", "abx"]
    assert ("".join(deltas), stopped) == ("xxabx", True)


def test_special_tokens_and_half_characters_at_the_end():
    assert streamed(Bytes(), [104, 256, 105])[0] == ["h", "", "i", ""]
    assert "".join(streamed(Bytes(), [104, 0xE2, 0x82])[0]) == "h�"
