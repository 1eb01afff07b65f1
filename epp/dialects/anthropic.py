"""Anthropic's bodies: messages and count_tokens.

What identifies the prompt leaves out what the engines leave out and clients change from turn to turn: Claude Code's
billing line (a hash that is new in every request, in the very first block) and `cache_control` marks, which move to
the newest message. Without that no turn would begin with the bytes of the one before.
Source: Anthropic API reference; vLLM's conversion of system blocks.
"""

from __future__ import annotations

import re

from msgspec import Raw

from epp.dialects.body import ABSENT, Body, Message, estimate, open_ended, read_media, read_messages, require, whole

# Unescaped quotes cannot be inside a text, so these match members and texts, never what somebody wrote about them.
_BILLING = re.compile(rb'"x-anthropic-billing-header(?:[^"\\]|\\.)*+"')
_CACHE_MARK = re.compile(rb',\s*"cache_control"\s*:\s*(?:\{[^{}]*+\}|null)')


class Messages(Body):
    """`messages`."""

    system: Raw = ABSENT
    tools: Raw = ABSENT
    messages: Raw = ABSENT
    max_tokens: Raw = ABSENT

    def check(self) -> None:
        require("messages", self.messages)

    def output_limit(self) -> int | None:
        return whole(self.max_tokens)

    def prompt_bytes(self, most: int) -> bytes:
        # All of it, since what is left out may be anywhere. bytes(): a msgspec.Raw is not quite bytes.
        prompt = open_ended(Raw(_BILLING.sub(b'""', bytes(self.system))), self.tools, self.messages)
        return _CACHE_MARK.sub(b"", prompt) if b'"cache_control"' in prompt else prompt

    def prompt_tokens(self) -> int:
        return estimate(self.system, self.tools, self.messages)

    def conversation(self) -> tuple[Message, ...]:
        """The system prompt first, as a message of role "system"."""
        system = tuple(Message("system", message.parts) for message in read_messages(Raw(_as_message(self.system))))
        return system + read_messages(self.messages)

    def media(self) -> tuple[bytes, ...]:
        return read_media(self.messages)


def _as_message(system: Raw) -> bytes:
    """A system prompt, text or blocks, as a list of one message; an empty list where there is none."""
    return b'[{"content":%b}]' % bytes(system) if system else b"[]"
