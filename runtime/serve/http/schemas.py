"""Requests and answers of OpenAI's API, as far as they are honoured; other fields are refused by name.

After OpenAI's published API reference; ``top_k``, ``ignore_eos`` are what vLLM adds to it, under its names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moeless_opt.runtime.serve import Sampling

__all__ = [
    "UNSUPPORTED",
    "ChatAnswer",
    "ChatMessage",
    "ChatRequest",
    "CompletionAnswer",
    "CompletionRequest",
    "ErrorAnswer",
    "ModelCard",
    "ModelList",
    "sampling_of",
]

UNSUPPORTED: dict[str, str] = {
    "best_of": "1",
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "{}",
    "suffix": "null",
    "tools": "[]",
    "tool_choice": '"none"',
    "response_format": '{"type": "text"}',
    "modalities": '["text"]',
    "store": "false",
}
"""Fields that only take the value by which they change nothing, and that value."""

MOST_STOPS = 16
MOST_MESSAGES = 1024
SEED = 2**63

Text = Annotated[str, Field(max_length=1 << 20)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1 << 20)]
Prompt = (
    Text
    | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    | Annotated[list[Text], Field(min_length=1)]
    | Annotated[list[Tokens], Field(min_length=1)]
)
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream has besides the text."""

    include_usage: bool = Field(default=False, description="A last chunk with the numbers of tokens.")


class _PlainFormat(_Strict):
    type: Literal["text"]


class _Asked(_Strict):
    """Fields that both kinds of request have."""

    model: str | None = Field(default=None, max_length=1024, description="One of `/v1/models`.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(
        default=None, ge=0, lt=2**31, description="Only so many likeliest tokens; 0: all."
    )
    n: int | None = Field(default=None, ge=1, le=64, description="Answers for each prompt.")
    seed: int | None = Field(default=None, ge=-SEED, lt=SEED)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    ignore_eos: bool = Field(default=False, description="Go on behind a token that ends the text.")
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = Field(default=None, max_length=1024, description="Changes nothing.")


class CompletionRequest(_Asked):
    """Texts to be continued."""

    prompt: Prompt = Field(description="A text, several, or their tokens.")
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Of each answer; 16 by default.")
    echo: bool | None = Field(default=None, description="Give the prompt back in front; not with `logprobs`.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: str | None = Field(default=None, max_length=256)

    def plain(self) -> dict[str, str]:
        """What chat templates know."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatRequest(_Asked):
    """A conversation to be answered."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="As `max_completion_tokens`.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Of each answer; by default what the context has room for."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Only with `logprobs`.")
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    response_format: _PlainFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        default=None, description="Changes nothing."
    )


def sampling_of(
    asked: CompletionRequest | ChatRequest, seed: int, max_tokens: int | None, logprobs: int | None
) -> Sampling:
    """How the engine shall choose the tokens of one answer."""
    stop = asked.stop if asked.stop is not None else []
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k or 0,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        max_tokens=max_tokens,
        logprobs=logprobs,
        ignore_end=asked.ignore_eos,
    )


# -------------------------------------------------------------------------------------------- answers


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """Answer to a `CompletionRequest`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A generated token, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """Answer to a `ChatRequest`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error."""

    error: ErrorDetail
