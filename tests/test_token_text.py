"""Can every token be seen, spaces and parts of characters too, and is none mistaken for another?"""

from train.token_text import running_text, token_name, visible
from train.tokenizer import ByteTokenizer, train_bpe


def test_bytes_become_visible():
    for data, shown in {
        b" a\n\tb": "·a⏎⇥b",
        "é한".encode(): "é한",
        "한".encode()[:2]: "⟨ED 95⟩",
        b"a\xffb": "a⟨FF⟩b",
        # What UTF-8 calls a surrogate is no character.
        b"\xed\xa0\x80": "⟨ED A0 80⟩",
        "\u2028\u200f\x07".encode(): "⟨U+2028⟩⟨U+200F⟩⟨U+0007⟩",
        "\u0301x".encode(): "◌\u0301x",
        b"</script>": "</script>",
        b"": "",
    }.items():
        assert visible(data) == shown, data


def test_tokens_of_a_bpe_are_the_bytes_of_its_text():
    text = "the meadow, the heron </script> 한국어 \u2028\n" * 30
    tokenizer = train_bpe(iter([text] * 3), 300, progress=False)
    tokens = tokenizer.encode(text + "\x00é")
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    assert b"".join(piece or b"" for piece in pieces).decode() == text + "\x00é"
    assert any(b"\x80" <= piece[:1] <= b"\xbf" for piece in pieces if piece), "no partial character"
    shown = "".join(running_text(tokenizer, tokens))
    assert shown.replace("◌", "").startswith("the·meadow,·the·heron·</script>·한국어·⟨U+2028⟩⏎")
    for special in (tokenizer.end_of_text, tokenizer.pad, 10**6):
        assert tokenizer.token_bytes(special) is None
    assert token_name(tokenizer, tokenizer.end_of_text) == "⟨end of text⟩"
    assert token_name(tokenizer, 10**6) == "⟨token 1000000⟩"


def test_a_character_stands_at_the_token_that_completes_it():
    tokenizer = ByteTokenizer()
    tokens = [*"é한".encode(), tokenizer.end_of_text, 0xFF, *b"A"]
    assert running_text(tokenizer, tokens) == [
        "◌",
        "é",
        "◌",
        "◌",
        "한",
        "⟨end of text⟩",
        "\ufffd",
        "A",
    ]
    # What a text breaks off stays a part.
    assert running_text(tokenizer, [0xED, tokenizer.end_of_text]) == ["◌", "⟨end of text⟩"]
