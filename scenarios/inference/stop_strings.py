"""Finds stop strings in the text of generated tokens, by decoding its tail only."""

from collections.abc import Sequence

from scenarios.data.tokenizer import Tokenizer

UNREADABLE = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet."""
ROOM = 64
"""Characters that the tail may have beyond twice the longest string before it is cut."""


class StopStrings:
    """Watches the tokens of one request; a function of the tokens alone.

    Args:
        tokenizer: of the model.
        strings: at least one, none empty or with U+FFFD.

    The tail is cut between two tokens only where its text stays the end of the whole text: not
    inside a character, nor where a decoder would write the first token otherwise. What is kept
    has as many readable characters as the longest string; U+FFFD at its end may still change.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, strings
        self._longest = max(map(len, strings))
        self.tail: list[int] = []
        """The tokens that are decoded."""

    def ended_by(self, token: int) -> bool:
        """Whether the text of the tokens so far, this next one included, contains one of them."""
        self.tail.append(token)
        text = self._tokenizer.decode(self.tail)
        if any(string in text for string in self._strings):
            return True
        if len(text) > 2 * self._longest + ROOM:
            self._cut(text)
        return False

    def _cut(self, text: str) -> None:
        kept = self.tail[len(self.tail) // 2 :]
        end = self._tokenizer.decode(kept)
        if text.endswith(end) and len(end.rstrip(UNREADABLE)) >= self._longest:
            self.tail = kept
