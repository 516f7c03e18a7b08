"""A conversation -> one string and the spans of it that are learnt.

Spans are found by rendering prefixes of the conversation, one per assistant turn, so a chat template needs no
{% generation %} block. The stop token belongs to the span: it is told apart from padding by position, not by its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.schema import Conversation, Message, PlainText, SchemaError

RESPONSE_TEMPLATE = "\n\n### Response:\n"
INSTRUCTION_TEMPLATE = "### Instruction:\n"
"""Alpaca's headings, for tokenizers without a chat template."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text, and where the loss is taken: [start, end) in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool
    """True if the text itself has no BOS yet."""


class Renderer:
    """Renders with the tokenizer's chat template if it has one, with headings otherwise."""

    def __init__(self, tokenizer: Any, *, response_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token or ""
        self.response_template = response_template or RESPONSE_TEMPLATE
        self.uses_chat_template = bool(tokenizer.chat_template) and response_template is None
        self._stops = tuple(token for token in tokenizer.all_special_tokens if token)

    def render(self, example: Conversation | PlainText) -> Rendered:
        """Raises SchemaError if the template refuses the conversation or rewrites an answer beyond recognition."""
        if isinstance(example, PlainText):
            return Rendered(example.text, ((0, len(example.text)),), add_special_tokens=True)
        if not self.uses_chat_template:
            return self._with_headings(example)
        text = self._apply(example.messages)
        spans = tuple(
            self._answer_span(example.messages, index, text)
            for index, message in enumerate(example.messages)
            if message.role == "assistant"
        )
        return Rendered(text, spans, add_special_tokens=False)

    def prompt(self, question: str) -> str:
        """The text that asks the model for an answer."""
        if self.uses_chat_template:
            return self._apply((Message("user", question),), add_generation_prompt=True)
        return f"{INSTRUCTION_TEMPLATE}{question}{self.response_template}"

    def _apply(self, messages: tuple[Message, ...], *, add_generation_prompt: bool = False) -> str:
        turns = [{"role": item.role, "content": item.content} for item in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except Exception as error:  # Jinja raises what the template's author chose (raise_exception)
            raise SchemaError(f"the chat template refuses it: {error}") from error

    def _answer_span(self, messages: tuple[Message, ...], index: int, text: str) -> tuple[int, int]:
        asked = self._apply(messages[:index], add_generation_prompt=True) if index else ""
        start = _common_prefix(asked, text)
        answered = self._apply(messages[: index + 1])
        if text.startswith(answered):
            end = len(answered)
        else:  # a template that renders the last turn unlike earlier ones (reasoning blocks)
            content = messages[index].content.strip()
            found = text.find(content, start)
            if found < 0:
                raise SchemaError(f"the chat template rewrites the answer in turn {index}")
            end = self._with_stop(text, found + len(content))
        stripped = text[start:end].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._stops) else (start, end)

    def _with_stop(self, text: str, end: int) -> int:
        rest = text[end:]
        skipped = len(rest) - len(rest.lstrip())
        for stop in self._stops:
            if rest.lstrip().startswith(stop):
                return end + skipped + len(stop)
        return end

    def _with_headings(self, example: Conversation) -> Rendered:
        text, spans = "", []
        for message in example.messages:
            if message.role == "assistant":
                text += self.response_template
                spans.append((len(text), len(text) + len(message.content) + len(self.eos)))
                text += message.content + self.eos
            else:
                text += ("\n\n" if text else "") + (INSTRUCTION_TEMPLATE if message.role == "user" else "")
                text += message.content
        return Rendered(text, tuple(spans), add_special_tokens=True)


def _common_prefix(first: str, second: str) -> int:
    if second.startswith(first):
        return len(first)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
