"""Text as it comes, token by token: whole characters, and nothing of a stop text."""

from __future__ import annotations

import random

import pytest

from moeless_opt.runtime.serve.engine.codec import BytesCodec, TextStream

CODEC = BytesCodec(256)


def parts(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, out = TextStream(CODEC, stop, CODEC.encode("prompt é")), []
    for place, byte in enumerate(text):
        out.append(stream.push(byte, last=place == len(text) - 1))
        if stream.stopped:
            break
    return out, stream.stopped


@pytest.mark.parametrize("text", ["plain", "é", "人生 и жизнь 🦊!", "a�b", ""])
def test_characters_come_whole(text: str) -> None:
    out, _ = parts(text.encode())
    assert "".join(out) == text
    assert all("�" not in part or "�" in text for part in out)


def test_bytes_that_are_no_character_come_at_last() -> None:
    out, _ = parts(b"ab\xff\xfe\xfdcd")
    joined = "".join(out)
    assert joined.startswith("ab")
    assert joined.endswith("cd")
    assert "�" in joined
    out, _ = parts(b"\x80" * 30)
    assert "".join(out).count("�") == 30


@pytest.mark.parametrize("seed", range(20))
def test_text_ends_in_front_of_the_first_stop_text(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abé") for _ in range(40))
    stop = tuple({"".join(rng.choice("abé") for _ in range(rng.randrange(1, 5))) for _ in range(3)})
    first = min((text.index(s) for s in stop if s in text), default=None)
    out, stopped = parts(text.encode(), stop)
    assert stopped == (first is not None)
    # The earliest end is what counts, not the earliest beginning: as soon as one is complete it is over.
    ends = min((text.index(s) + len(s) for s in stop if s in text), default=len(text))
    done = [s for s in stop if s in text[:ends]]
    wanted = text[: min(text.index(s) for s in done)] if done else text
    assert "".join(out) == wanted


def test_a_beginning_of_a_stop_text_is_held_back_and_comes_if_it_goes_on_otherwise() -> None:
    stream = TextStream(CODEC, ("END",))
    assert [stream.push(b) for b in b"xENx"] == ["x", "", "", "ENx"]
    stream.push(ord("E"))
    assert stream.flush() == "E"
