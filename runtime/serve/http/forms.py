"""The two forms of an answer, texts and conversations: as a whole, and in pieces for a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moeless_opt.runtime.serve import Emitted, TextCodec

__all__ = ["AnswerForm", "ChatForm", "CompletionForm"]


class AnswerForm(Protocol):
    """How what an engine emits is written down."""

    prefix: str
    whole_object: str
    piece_object: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream has of an answer in front of its first token, if anything."""
        ...

    def piece(self, index: int, emitted: Emitted) -> dict[str, Any] | None:
        """What one token adds, or None."""
        ...

    def whole(self, index: int, emitted: Sequence[Emitted]) -> dict[str, Any]:
        """An answer that has ended."""
        ...


class CompletionForm:
    """Texts.

    Parameters
    ----------
    codec : TextCodec
        For the names of tokens.
    logprobs : bool
        Whether they are asked for.
    echoes : sequence of str
        What stands in front of every answer.
    """

    prefix = "cmpl-"
    whole_object = piece_object = "text_completion"

    def __init__(self, codec: TextCodec, logprobs: bool, echoes: Sequence[str]) -> None:
        self._codec, self._logprobs, self._echoes = codec, logprobs, echoes
        self._offset: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, where it is wanted back."""
        if not self._echoes[index]:
            return None
        return {"index": index, "text": self._echoes[index], "logprobs": None, "finish_reason": None}

    def piece(self, index: int, emitted: Emitted) -> dict[str, Any] | None:
        """One token's part."""
        probabilities = self._probabilities(index, [emitted])
        if not emitted.text and not emitted.finish and probabilities is None:
            return None
        return {
            "index": index,
            "text": emitted.text,
            "logprobs": probabilities,
            "finish_reason": emitted.finish,
        }

    def whole(self, index: int, emitted: Sequence[Emitted]) -> dict[str, Any]:
        """The text."""
        return {
            "index": index,
            "text": self._echoes[index] + "".join(e.text for e in emitted),
            "logprobs": self._probabilities(index, emitted),
            "finish_reason": emitted[-1].finish,
        }

    def _probabilities(self, index: int, emitted: Sequence[Emitted]) -> dict[str, Any] | None:
        told = [e for e in emitted if e.token is not None and e.logprob is not None]
        offsets, at = [], self._offset.get(index, 0)
        for e in emitted:
            if e.token is not None and e.logprob is not None:
                offsets.append(at)
            at += len(e.text)
        self._offset[index] = at
        if not self._logprobs or not told:
            return None
        name = self._codec.token_text
        return {
            "tokens": [name(e.token) for e in told if e.token is not None],
            "token_logprobs": [e.logprob for e in told],
            "top_logprobs": [{name(t): p for t, p in e.top} for e in told],
            "text_offset": offsets,
        }


class ChatForm:
    """Turns of a conversation.

    Parameters
    ----------
    codec : TextCodec
        For the names of tokens.
    logprobs : bool
        Whether they are asked for.
    """

    prefix = "chatcmpl-"
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, codec: TextCodec, logprobs: bool) -> None:
        self._codec, self._logprobs = codec, logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, emitted: Emitted) -> dict[str, Any] | None:
        """One token's part."""
        probabilities = self._probabilities([emitted])
        if not emitted.text and not emitted.finish and probabilities is None:
            return None
        delta = {"content": emitted.text} if emitted.text or not emitted.finish else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": probabilities,
            "finish_reason": emitted.finish,
        }

    def whole(self, index: int, emitted: Sequence[Emitted]) -> dict[str, Any]:
        """The message."""
        content = "".join(e.text for e in emitted)
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._probabilities(emitted),
            "finish_reason": emitted[-1].finish,
        }

    def _probabilities(self, emitted: Sequence[Emitted]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**self._token(e.token, e.logprob), "top_logprobs": [self._token(t, p) for t, p in e.top]}
            for e in emitted
            if e.token is not None and e.logprob is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._codec.token_text(token), list(self._codec.token_bytes(token))
        return {"token": text, "logprob": logprob, "bytes": raw}
