"""OpenAI's bodies: chat, completions, embeddings, responses, conversations, images, speech, and forms (uploads).

Every prompt and input shape that the API allows: a text, a list of texts, token ids, a list of lists of token ids;
Responses input as a text or a list of items; chat content as a text, a list of parts, or null beside tool calls.
Fields that engines add to the API (`cache_salt`, `prompt_embeds`, chat messages for embeddings, batched chats) too.
Not part of the prompt: `documents`, `chat_template_kwargs` and what else a template may read; two requests that differ
only there look alike, as they do to the reference.
Source: OpenAI API reference; vLLM's protocol for its additions.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Raw
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from epp.dialects.body import (
    ABSENT,
    TOKENS_PER_BLOB,
    Body,
    Message,
    are_ids,
    count_tokens,
    estimate,
    first_item,
    first_prompt,
    open_ended,
    read_media,
    read_messages,
    require,
    string,
    whole,
)
from epp.errors import BadRequest

MAX_PARTS: Final = 1_000
"""Parts of a form: each costs microseconds, as does whatever looks like one, and no API has two dozen fields."""

_BATCH = re.compile(rb"\[\s*\[")


class Chat(Body):
    """`chat/completions`, with `/render` and `/batch`, whose messages are a list of conversations: the first counts."""

    messages: Raw = ABSENT
    tools: Raw = ABSENT
    max_completion_tokens: Raw = ABSENT
    max_tokens: Raw = ABSENT

    def check(self) -> None:
        require("messages", self.messages)

    def output_limit(self) -> int | None:
        limit = whole(self.max_completion_tokens)
        return whole(self.max_tokens) if limit is None else limit

    def prompt_bytes(self, most: int) -> bytes:
        return open_ended(self.tools, self._one(), most=most)

    def prompt_tokens(self) -> int:
        return estimate(self.tools, self.messages)

    def conversation(self) -> tuple[Message, ...]:
        return read_messages(self._one())

    def media(self) -> tuple[bytes, ...]:
        return read_media(self._one())

    def _one(self) -> Raw:
        return first_item(self.messages) if _BATCH.match(self.messages) else self.messages


class Completion(Body):
    """`completions`, with `/render`. A prompt given as embeddings alone cannot be told from another."""

    prompt: Raw = ABSENT
    prompt_embeds: Raw = ABSENT
    max_tokens: Raw = ABSENT

    def check(self) -> None:
        require("prompt", self.prompt, self.prompt_embeds)

    def output_limit(self) -> int | None:
        return whole(self.max_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.prompt, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.prompt)

    def has_ids(self) -> bool:
        return are_ids(self.prompt)


class Embedding(Body):
    """`embeddings`; vLLM also takes `messages` in place of `input`."""

    input: Raw = ABSENT
    messages: Raw = ABSENT

    def check(self) -> None:
        require("input", self.input, self.messages)

    def prompt_bytes(self, most: int) -> bytes:
        return open_ended(self.messages, most=most) or first_prompt(self.input, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.input) + count_tokens(self.messages)

    def has_ids(self) -> bool:
        return are_ids(self.input)

    def conversation(self) -> tuple[Message, ...]:
        return read_messages(self.messages)

    def media(self) -> tuple[bytes, ...]:
        return read_media(self.messages)


class Responses(Body):
    """`responses`. What `previous_response_id` or a stored prompt adds is known to the model server alone."""

    input: Raw = ABSENT
    instructions: Raw = ABSENT
    tools: Raw = ABSENT
    max_output_tokens: Raw = ABSENT
    previous_response_id: Raw = ABSENT

    def check(self) -> None:
        require("input", self.input)

    def output_limit(self) -> int | None:
        return whole(self.max_output_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        return open_ended(self.instructions, self.tools, self.input, most=most)

    def prompt_tokens(self) -> int:
        return estimate(self.instructions, self.tools, self.input)

    def conversation(self) -> tuple[Message, ...]:
        return read_messages(self.input)

    def media(self) -> tuple[bytes, ...]:
        return read_media(self.input)

    def previous(self) -> str:
        return string(self.previous_response_id)


class Conversation(Body):
    """`conversations`: the API has no model in it and allows an empty one."""

    items: Raw = ABSENT

    def prompt_bytes(self, most: int) -> bytes:
        return open_ended(self.items, most=most)

    def prompt_tokens(self) -> int:
        return estimate(self.items)

    def conversation(self) -> tuple[Message, ...]:
        return read_messages(self.items)


class Image(Body):
    """`images/generations`, and `images/edits` or `images/variations` where they come as JSON."""

    prompt: Raw = ABSENT

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.prompt, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.prompt)


class Generation(Image):
    """`images/generations`: unlike a variation, nothing without a prompt."""

    def check(self) -> None:
        require("prompt", self.prompt)


class Speech(Body):
    """`audio/speech`."""

    input: Raw = ABSENT

    def check(self) -> None:
        require("input", self.input)

    def prompt_bytes(self, most: int) -> bytes:
        return first_prompt(self.input, most)

    def prompt_tokens(self) -> int:
        return count_tokens(self.input)


class Form(Body):
    """An upload: `audio/transcriptions`, `audio/translations`, `images/edits`, `images/variations`.

    Files are never copied: only where the fields `model` and `stream` lie is kept.
    """

    model_spans: tuple[tuple[int, int], ...] = ()
    """Where in the body the values of the field `model` are."""

    def prompt_tokens(self) -> int:
        return TOKENS_PER_BLOB  # the file; how long it plays is not known


class _Fields:
    """The spans of a form's small fields, as the parser tells them."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[int, int]]] = {"model": [], "stream": []}
        self._name = self._header = b""
        self._start = self._end = -1

    def part_begin(self) -> None:
        self._name, self._header, self._start = b"", b"", -1

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = data[start:end].lower()

    def header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header == b"content-disposition":
            self._name = parse_options_header(data[start:end])[1].get(b"name", b"")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._start, self._end = (start if self._start < 0 else self._start), end

    def part_end(self) -> None:
        if self._start >= 0 and (spans := self.spans.get(self._name.decode("latin-1"))) is not None:
            spans.append((self._start, self._end))


def read_form(body: bytes, content_type: str) -> Form:
    """Read `multipart/form-data`; of several fields of one name the last counts, as for the model servers' frameworks.

    Raises BadRequest when it is not a form, or one of more than MAX_PARTS parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise BadRequest("the request's content-type names no multipart boundary")
    if body.count(b"\r\n--" + boundary) > MAX_PARTS:
        raise BadRequest(f"the form has more than {MAX_PARTS} parts")
    fields = _Fields()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": fields.part_begin,
                "on_header_field": fields.header_field,
                "on_header_value": fields.header_value,
                "on_part_data": fields.part_data,
                "on_part_end": fields.part_end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the request body is not valid multipart/form-data: {error}") from None
    return _form(body, fields.spans["model"], fields.spans["stream"])


def _form(body: bytes, models: list[tuple[int, int]], streams: list[tuple[int, int]]) -> Form:
    try:
        model = body[slice(*models[-1])].decode() if models else None
    except UnicodeDecodeError:
        raise BadRequest("the form's field `model` is not UTF-8") from None
    stream = body[slice(*streams[-1])].strip().lower() if streams else b""
    return Form(model=model, stream=Raw(b"true") if stream in (b"true", b"1") else ABSENT, model_spans=tuple(models))
