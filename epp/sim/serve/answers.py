"""How vLLM says it: answers, streams, errors and the model list, byte shapes as recorded from vLLM 0.32.

In: what is known of a request and its tokens. Out: bytes of JSON or of server-sent events.
Rules here: no I/O; a streamed token costs one concatenation of three byte strings, what surrounds it is made once.
Source: recordings of vLLM 0.32.0; Anthropic's event types as vLLM's `/v1/messages` sends them.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from epp.errors import Refusal
from epp.sim import text
from epp.sim.serve.asks import InvalidBody, UnknownModel

FINGERPRINT: Final = "vllm-0.32.0-simulated"
DONE: Final = b"data: [DONE]\n\n"

encode = msgspec.json.encode


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    prompt: int
    completion: int
    cached: int


class Answer(Protocol):
    """One dialect's way to answer one request."""

    def whole(self, usage: Usage) -> bytes:
        """The answer in one piece."""
        ...

    def opening(self, usage: Usage) -> bytes:
        """Events before the first token."""
        ...

    def tokens(self, start: int, end: int) -> bytes:
        """Events of tokens `start` … `end - 1`, none of them the last of the answer."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """Events of the last token and after it."""
        ...


class _Events:
    """Server-sent events of tokens: what stands before and after a token's text is the same for all of one answer."""

    def __init__(self, frame: bytes) -> None:
        self.before, self.after = frame.rsplit(b"@", 1)

    def tokens(self, start: int, end: int) -> bytes:
        if end == start + 1:
            return self.before + text.words(start, 1).encode() + self.after
        return b"".join(self.before + text.words(at, 1).encode() + self.after for at in range(start, end))


class ChatAnswer:
    """`/v1/chat/completions`."""

    def __init__(self, key: str, model: str, created: int, finish: str, include_usage: bool) -> None:
        self._id, self._model, self._created = f"chatcmpl-{key}", model, created
        self._finish, self._include_usage = finish, include_usage
        self._events = _Events(self._event([_chat_delta({"content": "@"})]))
        self.tokens = self._events.tokens

    def whole(self, usage: Usage) -> bytes:
        message = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        said = {"role": "assistant", "content": text.words(0, usage.completion), **message}
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": self._finish, **_CHOICE_REST}
        rest = {"prompt_logprobs": None, "prompt_token_ids": None}
        return _whole(self._id, "chat.completion", self._created, self._model, choice, usage, **rest)

    def opening(self, usage: Usage) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._event([choice], prompt_token_ids=None, prompt_text=None)

    def closing(self, usage: Usage) -> bytes:
        last = _chat_delta({"content": text.words(usage.completion - 1, 1)}, self._finish)
        if not self._include_usage:
            return self._event([last], system_fingerprint=FINGERPRINT) + DONE
        counted = self._event([], usage=_streamed_usage(usage), system_fingerprint=FINGERPRINT)
        return self._event([last]) + counted + DONE

    def _event(self, choices: list[dict[str, Any]], **rest: Any) -> bytes:
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        return b"data: " + encode({**head, "choices": choices, **rest}) + b"\n\n"


class CompletionAnswer:
    """`/v1/completions`."""

    def __init__(self, key: str, model: str, created: int, finish: str, include_usage: bool) -> None:
        self._id, self._model, self._created = f"cmpl-{key}", model, created
        self._finish, self._include_usage = finish, include_usage
        self._events = _Events(self._event([_completion_delta("@")]))
        self.tokens = self._events.tokens

    def whole(self, usage: Usage) -> bytes:
        said = {"index": 0, "text": text.words(0, usage.completion), "logprobs": None, "finish_reason": self._finish}
        choice = {**said, **_CHOICE_REST, "prompt_logprobs": None, "prompt_token_ids": None}
        return _whole(self._id, "text_completion", self._created, self._model, choice, usage)

    def opening(self, usage: Usage) -> bytes:
        return b""

    def closing(self, usage: Usage) -> bytes:
        last = self._event([_completion_delta(text.words(usage.completion - 1, 1), self._finish)])
        return last + (self._event([], usage=_streamed_usage(usage)) if self._include_usage else b"") + DONE

    def _event(self, choices: list[dict[str, Any]], **rest: Any) -> bytes:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        return b"data: " + encode({**head, "choices": choices, **rest}) + b"\n\n"


class MessagesAnswer:
    """Anthropic's `/v1/messages`. Input tokens are those that were not in the cache, as Anthropic counts."""

    def __init__(self, key: str, model: str, created: int, finish: str, include_usage: bool) -> None:
        self._id, self._model = f"chatcmpl-{key}", model
        self._stop = "max_tokens" if finish == "length" else "end_turn"
        self._events = _Events(_named({"type": "content_block_delta", "index": 0, "delta": _text_delta("@")}))
        self.tokens = self._events.tokens

    def whole(self, usage: Usage) -> bytes:
        said = [{"type": "text", "text": text.words(0, usage.completion)}]
        return encode(self._message(said, self._stop, _anthropic_usage(usage, usage.completion)))

    def opening(self, usage: Usage) -> bytes:
        message = self._message([], None, _anthropic_usage(usage, 0))
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _named({"type": "message_start", "message": message}) + _named(block)

    def closing(self, usage: Usage) -> bytes:
        last = self.tokens(usage.completion - 1, usage.completion)
        delta = {"stop_reason": self._stop, "stop_sequence": None}
        counted = {"type": "message_delta", "delta": delta, "usage": _anthropic_usage(usage, usage.completion)}
        return last + _named({"type": "content_block_stop", "index": 0}) + _named(counted) + _MESSAGE_STOP

    def _message(self, content: list[dict[str, Any]], stop: str | None, usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "content": content, "model": self._model}
        return {**head, "stop_reason": stop, "usage": usage}


def openai_error(status: int, message: str, kind: str, param: str | None) -> bytes:
    """vLLM's error JSON."""
    return encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def anthropic_error(status: int, message: str, kind: str, param: str | None) -> bytes:
    """The same in Anthropic's form, as vLLM's `/v1/messages` has it."""
    return encode({"type": "error", "error": {"type": kind, "message": message}})


def error_kind(refusal: Refusal) -> tuple[str, str | None]:
    """vLLM's `type` and `param`."""
    match refusal:
        case UnknownModel():
            return "NotFoundError", "model"
        case InvalidBody():
            return "Bad Request", refusal.param
        case _:
            return "BadRequestError", None


def model_list(model: str, adapters: tuple[str, ...], created: int, max_model_len: int) -> bytes:
    """`/v1/models`: the base model and its adapters."""
    cards = [_model_card(model, None, created, max_model_len)]
    cards += [_model_card(adapter, model, created, None) for adapter in adapters]
    return encode({"object": "list", "data": cards})


def _model_card(name: str, parent: str | None, created: int, max_model_len: int | None) -> dict[str, Any]:
    head = {"id": name, "object": "model", "created": created, "owned_by": "vllm", "root": name, "parent": parent}
    return {**head, "max_model_len": max_model_len, "permission": []}


def _whole(key: str, kind: str, created: int, model: str, choice: dict[str, Any], usage: Usage, **rest: None) -> bytes:
    details = {"cached_tokens": usage.cached, "created_cache_tokens": None, "multimodal_tokens": None}
    counted = {**_totals(usage), "prompt_tokens_details": details, "completion_tokens_details": None}
    head = {"id": key, "object": kind, "created": created, "model": model, "choices": [choice], "service_tier": None}
    return encode({**head, "system_fingerprint": FINGERPRINT, "usage": counted, **rest, "kv_transfer_params": None})


def _totals(usage: Usage) -> dict[str, int]:
    total = usage.prompt + usage.completion
    return {"prompt_tokens": usage.prompt, "total_tokens": total, "completion_tokens": usage.completion}


def _streamed_usage(usage: Usage) -> dict[str, Any]:
    return {**_totals(usage), "prompt_tokens_details": {"cached_tokens": usage.cached}}


def _chat_delta(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return choice | ({"stop_reason": None} if finish else {}) | {"token_ids": None}


def _completion_delta(said: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": said, "logprobs": None, "finish_reason": finish, "stop_reason": None, "token_ids": None}


def _text_delta(said: str) -> dict[str, str]:
    return {"type": "text_delta", "text": said}


def _anthropic_usage(usage: Usage, output: int) -> dict[str, int]:
    counted = {"input_tokens": usage.prompt - usage.cached, "output_tokens": output}
    return {**counted, "cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached}


def _named(event: dict[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode(event) + b"\n\n"


_CHOICE_REST: Final = {"stop_reason": None, "token_ids": None, "routed_experts": None}
_MESSAGE_STOP: Final = _named({"type": "message_stop"})
