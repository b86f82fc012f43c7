"""How is a token shown to a person? Spaces, line ends and parts of characters become visible."""

import codecs
import re
import unicodedata
from collections.abc import Sequence

from train.tokenizer import Tokenizer

SPACE, LINE_END, TAB, PART = "·", "⏎", "⇥", "◌"
_VISIBLE = {" ": SPACE, "\n": LINE_END, "\t": TAB}
# Controls, formats (such as right-to-left marks), surrogates, unassigned, and odd spaces.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
_FIRST_BYTE = 0xDC00


def visible(data: bytes) -> str:
    """Text in which each character can be seen: `·` a space, `⏎` a line end, `⇥` a tab,
    `⟨E2 82⟩` bytes that are no whole character, `⟨U+200B⟩` a character without a shape."""
    text = "".join(map(_shown, data.decode("utf-8", errors="surrogateescape")))
    # Neighbouring bytes in one pair of brackets.
    text = re.sub(r"(?<=[0-9A-F]{2})⟩⟨(?=[0-9A-F]{2}⟩)", " ", text)
    return PART + text if text and unicodedata.category(text[0]).startswith("M") else text


def _shown(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if unicodedata.category(character) not in _HIDDEN:
        return character
    byte = ord(character) - _FIRST_BYTE
    return f"⟨{byte:02X}⟩" if 0x80 <= byte <= 0xFF else f"⟨U+{ord(character):04X}⟩"


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """One token by itself, as in `visible`; special ones in words, such as `⟨end of text⟩`."""
    data = tokenizer.token_bytes(token)
    if data is not None:
        return visible(data)
    return "⟨end of text⟩" if token == tokenizer.end_of_text else f"⟨token {token}⟩"


def running_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to a text: a character stands at the token that completes it, and `◌` at
    those before, which hold only a part of it."""
    shown = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        data = tokenizer.token_bytes(token)
        if data is None:
            decoder.reset()
            shown.append(token_name(tokenizer, token))
            continue
        text = decoder.decode(data)
        shown.append("".join(map(_shown, text)) or (PART if data else ""))
    return shown
