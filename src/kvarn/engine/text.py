"""The text of an answer as its tokens come, up to a string that ends it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # what the first bytes of a character decode to


class TextStream:
    """Gives text as soon as it cannot change any more: whole characters, and no beginning of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens before ``_read`` have been given, those from ``_first`` on are context
        self._held = ""
        self.stopped = False  # whether a stop string has come

    def push(self, token: int) -> str:
        """The text that ``token`` adds."""
        self._tokens.append(token)
        before, now = self._decode(self._tokens[self._first : self._read]), self._decode(self._tokens[self._first :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return self._until_stop(now[len(before) :])

    def finish(self) -> str:
        """The rest, where no further token comes."""
        if self.stopped:
            return ""
        before, now = self._decode(self._tokens[self._first : self._read]), self._decode(self._tokens[self._first :])
        self._first = self._read = len(self._tokens)
        text = self._until_stop(now[len(before) :])
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        counts = range(min(longest, len(text)), 0, -1)
        keep = next((n for n in counts if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
