"""Text and tokens: bytes of the small model, a checkpoint's tokenizer, and text that comes token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeless_opt.problems.errors import FormatError, MoelessError, ProblemError
from moeless_opt.runtime.serve import TextCodec

__all__ = ["BytesCodec", "FolderCodec", "TextStream"]

#: Tokens after which a character that is still not complete is given up.
LONGEST_CHARACTER = 8
INCOMPLETE = "\ufffd"


class BytesCodec:
    """Bytes as tokens, with one that starts a text: those of the small mixture of experts."""

    def __init__(self, start: int) -> None:
        self._start = start
        self.ends: frozenset[int] = frozenset({start})

    def encode(self, text: str) -> list[int]:
        """The start token and the bytes."""
        return [self._start, *text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """The byte as a character, or its number."""
        return chr(token) if token < 128 else f"<{token:#04x}>"

    def token_bytes(self, token: int) -> bytes:
        """The byte."""
        return bytes([token]) if token < 256 else b""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The messages one under the other: the small model knows no conversations, it goes on with text."""
        return self.encode("\n".join(str(message["content"]) for message in messages))


class FolderCodec:
    """The tokenizer in a checkpoint's folder, by `transformers`.

    Parameters
    ----------
    folder : path
        With its ``tokenizer.json`` (or what else the class of the tokenizer reads), and a chat template if
        it has one.

    Raises
    ------
    FormatError
        There is none, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MoelessError(
                "tokenizers of checkpoints need transformers: pip install transformers"
            ) from error
        try:
            self._inner = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            raise FormatError(str(folder), f"has no tokenizer that can be read: {error}") from error
        self.ends: frozenset[int] = frozenset(self._end_tokens(Path(folder)))

    def _end_tokens(self, folder: Path) -> list[int]:
        """What the generation settings and the tokenizer name as the end of a text."""
        from moeless_opt.problems.io import read_json

        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if not (folder / name).exists():
                continue
            settings = read_json(folder / name)
            named = settings.get("eos_token_id") if isinstance(settings, dict) else None
            found += named if isinstance(named, list) else [] if named is None else [named]
        found.append(self._inner.eos_token_id)
        return [token for token in found if isinstance(token, int)]

    def encode(self, text: str) -> list[int]:
        """Tokens, with those that the tokenizer puts in front."""
        return [int(token) for token in self._inner(text)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without marks."""
        text: str = self._inner.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> str:
        """One token's text, marks included."""
        text: str = self._inner.decode([token], skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Bytes of its text."""
        return self.decode([token]).encode()

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """By the folder's template."""
        if not getattr(self._inner, "chat_template", None):
            raise ProblemError("messages", "need a chat template, and this model's folder has none")
        from jinja2 import TemplateError

        try:
            text = self._inner.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            raise ProblemError("messages", f"are refused by the model's chat template: {error}") from error
        # The template writes the marks itself.
        return [int(token) for token in self._inner(text, add_special_tokens=False)["input_ids"]]


class TextStream:
    """The text of a request as its tokens come.

    Parameters
    ----------
    codec : TextCodec
        Turns tokens into text.
    stop : sequence of str
        Texts that end it.
    before : sequence of int
        The prompt's last tokens: how a token reads can depend on them.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str], before: Sequence[int] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._window = list(before[-LONGEST_CHARACTER:])
        self._read = len(self._window)
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """One more token; returns what is certain of the text by now.

        Parameters
        ----------
        token : int
            The token.
        last : bool
            Whether none will follow: nothing is held back then.
        """
        self._window.append(token)
        known = self._codec.decode(self._window[: self._read])
        text = self._codec.decode(self._window)
        fresh = len(self._window) - self._read
        if text.endswith(INCOMPLETE) and fresh < LONGEST_CHARACTER and not last:
            return self._certain("", last)
        added = (
            text[len(known) :] if text.startswith(known) else self._codec.decode(self._window[self._read :])
        )
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return self._certain(added, last)

    def flush(self) -> str:
        """What was held back, at the end."""
        fresh = self._window[self._read :]
        added, self._window, self._read = (self._codec.decode(fresh) if fresh else ""), [], 0
        return self._certain(added, last=True)

    def _certain(self, added: str, last: bool) -> str:
        self._held += added
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0 if last else max((self._overlap(text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _overlap(self, text: str) -> int:
        """Characters at the end of what is held with which a stop text begins."""
        most = min(len(text) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(text[:n])), 0)
