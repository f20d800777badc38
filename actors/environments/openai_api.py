"""The requests that an agent's session reads, and the answers that it writes: OpenAI's, with the
token ids and log-probs that vLLM adds.

A request that asks for what the policy's own draw cannot give is refused, never bent: other
samplings than the run's are the exception, as agents set them out of habit, and are named by
`drawn_otherwise`. Data only: knows no HTTP.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.environments.conversations import Answer, Refused
from actors.messages import FinishReason

Json = dict[str, Any]
Tokens = Field(None, gt=0)
_R = TypeVar("_R", bound=BaseModel)


class _Request(BaseModel):
    """Refuses what it does not know; a key that is null is one that is absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None}


class _Drawn(_Request):
    """How tokens are drawn: the run's own settings hold."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    min_tokens: Literal[0] | None = None
    stop: list[str] | None = Field(None, max_length=0)
    ignore_eos: Literal[False] | None = None

    def drawn_otherwise(self) -> tuple[str, ...]:
        """The settings that the agent gave and the run does not follow."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return tuple(name for name in names if getattr(self, name) is not None)


class _Labels(_Drawn):
    """What changes no answer of a session."""

    model: str = "policy"
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None


class StreamOptions(_Request):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Request):
    """The one format that is not forced on the model."""

    type: Literal["text"] = "text"


class ChatRequest(_Labels):
    """POST chat/completions."""

    messages: list[Json] = Field(min_length=1)
    tools: list[Json] | None = None
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = Tokens
    max_completion_tokens: int | None = Tokens
    response_format: TextFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(_Labels):
    """POST completions, with token ids alone."""

    prompt: list[int] = Field(min_length=1)
    max_tokens: int | None = Tokens
    logprobs: Literal[0, 1] | None = None
    echo: Literal[False] | None = None
    stream: Literal[False] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class GenerateSampling(_Drawn):
    """vLLM's sampling parameters."""

    max_tokens: int | None = Tokens
    logprobs: Literal[0, 1] | None = None
    prompt_logprobs: None = None
    stop_token_ids: list[int] | None = None  # those that end a turn anyway
    routed_experts_prompt_start: int | None = None  # no answer tells of experts
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None


class GenerateRequest(_Labels):
    """POST inference/v1/generate: ids in, ids out."""

    token_ids: list[int] = Field(min_length=1)
    sampling_params: GenerateSampling = GenerateSampling()
    output_mode: Literal["tokens"] = "tokens"
    stream: Literal[False] | None = None
    return_token_ids: bool | None = None


def parsed(kind: type[_R], body: bytes) -> _R:
    """The request in a body. Raises Refused, which names the key."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the body"
        given = "" if first["type"] in ("missing", "json_invalid") else f", not {_short(first)}"
        raise Refused(
            f"{key}: {first['msg']}{given}; a session of a run that trains answers no such request",
            "invalid_request",
        ) from error


def _short(error: Any) -> str:
    text = json.dumps(error["input"], default=str)
    return text if len(text) < 80 else f"{text[:77]}..."


def error_body(message: str, code: str, kind: str = "invalid_request_error") -> Json:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def models(name: str, max_tokens: int) -> Json:
    """The answer to GET models."""
    model = {"id": name, "object": "model", "created": 0, "owned_by": "aligntune"}
    return {"object": "list", "data": [{**model, "max_model_len": max_tokens}]}


def chat_answer(answer: Answer, request: ChatRequest, tokens: Sequence[str], created: int) -> Json:
    """The answer to a chat request; `tokens` are the texts of the sampled tokens."""
    choice = {
        "index": 0,
        "message": {"refusal": None, **_message(answer)},
        "finish_reason": _finish_reason(answer),
        "logprobs": _logprobs(answer, request, tokens),
    }
    if request.return_token_ids:
        choice["token_ids"] = sampled_ids(answer)
    return {
        **_head(answer, request.model, created, "chat.completion"),
        **_prompt_ids(answer, request.return_token_ids),
        "choices": [choice],
        "usage": _usage(answer),
    }


def chat_chunks(
    answer: Answer, request: ChatRequest, tokens: Sequence[str], created: int
) -> Iterator[Json]:
    """The same answer as the chunks of a stream."""
    head = _head(answer, request.model, created, "chat.completion.chunk")

    def chunk(delta: Json, finish_reason: str | None = None, **more: Any) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [{**choice, **more}]}

    message = _message(answer)
    calls = message.pop("tool_calls", ())
    yield {
        **chunk({"role": "assistant", "content": ""}),
        **_prompt_ids(answer, request.return_token_ids),
    }
    del message["role"]
    ids: Json = {"token_ids": sampled_ids(answer)} if request.return_token_ids else {}
    yield chunk(message, logprobs=_logprobs(answer, request, tokens), **ids)
    for index, call in enumerate(calls):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, _finish_reason(answer))
    if request.stream_options is not None and request.stream_options.include_usage:
        yield {**head, "choices": [], "usage": _usage(answer)}


def completion_answer(
    answer: Answer, request: CompletionRequest, text: str, tokens: Sequence[str], created: int
) -> Json:
    """The answer to a completion request: the whole `text` that was sampled, calls and all."""
    choice: Json = {
        "index": 0,
        "text": text,
        "finish_reason": _length_or_stop(answer),
        "logprobs": None,
    }
    if request.logprobs is not None:
        *offsets, _ = itertools.accumulate(map(len, tokens), initial=0)
        choice["logprobs"] = {
            "tokens": _names(answer, request, tokens),
            "token_logprobs": sampled_logprobs(answer),
            "top_logprobs": None,
            "text_offset": offsets,
        }
    if request.return_token_ids:
        choice |= {"token_ids": sampled_ids(answer), **_prompt_ids(answer, True)}
    head = _head(answer, request.model, created, "text_completion")
    return {**head, "choices": [choice], "usage": _usage(answer)}


def generate_answer(answer: Answer, request: GenerateRequest, created: int) -> Json:
    """The answer to ids in: ids out."""
    ids = sampled_ids(answer)
    choice: Json = {"index": 0, "finish_reason": _length_or_stop(answer), "token_ids": ids}
    if request.sampling_params.logprobs is not None:
        both = zip(ids, sampled_logprobs(answer), strict=True)
        choice["logprobs"] = {
            "content": [
                {"token": f"token_id:{i}", "token_id": i, "logprob": p, "top_logprobs": []}
                for i, p in both
            ]
        }
    return {
        "request_id": request.request_id or answer.id,
        "model": request.model,
        "created": created,
        "output_mode": "tokens",
        **_prompt_ids(answer, request.return_token_ids),
        "choices": [choice],
        "usage": _usage(answer),
    }


def sampled_ids(answer: Answer) -> list[int]:
    """The token ids of an answer."""
    return [int(token) for token in answer.call.sampled.token_ids]


def sampled_logprobs(answer: Answer) -> list[float]:
    """Their log-probs."""
    logprobs = answer.call.sampled.logprobs
    assert logprobs is not None, "the policy's tokens have log-probs"
    return [float(logprob) for logprob in logprobs]


def _head(answer: Answer, model: str, created: int, kind: str) -> Json:
    return {"id": answer.id, "object": kind, "created": created, "model": model}


def _prompt_ids(answer: Answer, wanted: bool | None) -> Json:
    return {"prompt_token_ids": answer.call.prompt_ids.tolist()} if wanted else {}


def _length_or_stop(answer: Answer) -> str:
    return "stop" if answer.call.finish_reason == FinishReason.STOP else "length"


def _finish_reason(answer: Answer) -> str:
    reason = _length_or_stop(answer)
    return "tool_calls" if reason == "stop" and answer.message.get("tool_calls") else reason


def _message(answer: Answer) -> Json:
    """The answer as OpenAI writes it: arguments of calls are a string of JSON."""
    message = {"role": "assistant", "content": answer.message.get("content") or None}
    known = {key: value for key, value in answer.message.items() if key not in message}
    if calls := known.get("tool_calls"):
        known["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in calls
        ]
    else:
        message["content"] = answer.message.get("content") or ""
    return {**message, **known}


def _logprobs(answer: Answer, request: ChatRequest, tokens: Sequence[str]) -> Json | None:
    if not request.logprobs:
        return None
    names = _names(answer, request, tokens)
    content = [
        {"token": name, "logprob": p, "bytes": list(text.encode()), "top_logprobs": []}
        for name, text, p in zip(names, tokens, sampled_logprobs(answer), strict=True)
    ]
    return {"content": content, "refusal": None}


def _names(
    answer: Answer, request: ChatRequest | CompletionRequest, tokens: Sequence[str]
) -> list[str]:
    """The tokens beside their log-probs: by id for who asks for ids, so that it can check that both
    belong together, unless it says otherwise."""
    by_id = request.return_tokens_as_token_ids
    if by_id is None:
        by_id = request.return_token_ids
    return [f"token_id:{i}" for i in sampled_ids(answer)] if by_id else list(tokens)


def _usage(answer: Answer) -> Json:
    prompt, sampled = len(answer.call.prompt_ids), len(answer.call.sampled.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }
