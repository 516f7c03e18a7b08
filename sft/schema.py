"""One row of any known schema -> a conversation or a plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""ShareGPT's and OpenAI's names for who speaks."""

SCHEMAS = (
    "messages [{role, content}]",
    "conversations [{from, value}]",
    "instruction, input, output",
    "prompt, response (or completion)",
    "text",
)
"""What is recognised, for error messages."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; the assistant's are what is learnt."""

    messages: tuple[Message, ...]

    @property
    def key(self) -> str:
        """What makes two examples the same question, so that a split never puts one of them on each side."""
        return "\n".join(item.content for item in self.messages if item.role != "assistant").strip()


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document; every token is learnt."""

    text: str

    @property
    def key(self) -> str:
        return self.text.strip()


class SchemaError(ValueError):
    """This row is in no known schema, or empty where it matters."""


def parse_row(
    value: Mapping[str, Any], *, prompt_key: str | None = None, response_key: str | None = None
) -> Conversation | PlainText:
    """Recognise the schema of a row by its keys.

    Args:
        prompt_key: column that holds the question, if it has a name of its own.
        response_key: column that holds the answer.

    Raises:
        SchemaError: with the reason, for the report by line number.
    """
    if prompt_key is not None or response_key is not None:
        return _pair(value, prompt_key or "prompt", response_key or "response")
    if "messages" in value:
        return _turns(value["messages"], "role", "content")
    if "conversations" in value:
        return _turns(value["conversations"], "from", "value")
    if "instruction" in value and "output" in value:
        return _alpaca(value)
    if "prompt" in value:
        for key in ("response", "completion"):
            if key in value:
                return _pair(value, "prompt", key)
    if "text" in value:
        return PlainText(_text(value, "text"))
    raise SchemaError(f"columns {', '.join(sorted(map(str, value)))} are in no known schema ({'; '.join(SCHEMAS)})")


def _text(value: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    text = value.get(key)
    if text is None and may_be_empty:
        return ""
    if not isinstance(text, str):
        raise SchemaError(f"{key} is {'missing' if key not in value else type(text).__name__}, not text")
    if not text.strip() and not may_be_empty:
        raise SchemaError(f"{key} is empty")
    return text


def _pair(value: Mapping[str, Any], prompt_key: str, response_key: str) -> Conversation:
    if isinstance(value.get(prompt_key), list):
        answer = value.get(response_key)
        answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return _turns([*value[prompt_key], *answers], "role", "content")
    system = _text(value, "system", may_be_empty=True)
    return _conversation(system, _text(value, prompt_key), _text(value, response_key))


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    context = _text(value, "input", may_be_empty=True)
    instruction = _text(value, "instruction")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return _conversation(_text(value, "system", may_be_empty=True), question, _text(value, "output"))


def _conversation(system: str, question: str, answer: str) -> Conversation:
    opening = (Message("system", system),) if system.strip() else ()
    return Conversation((*opening, Message("user", question), Message("assistant", answer)))


def _turns(turns: Any, role_key: str, content_key: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise SchemaError("the conversation is empty or no list")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise SchemaError(f"turn {index} is {type(turn).__name__}, not an object")
        name = turn.get(role_key, turn.get("role", turn.get("from")))
        role = _ROLES.get(str(name).lower())
        if role is None:
            raise SchemaError(f"turn {index} is by {name!r}; known are {', '.join(sorted(_ROLES))}")
        content = turn.get(content_key, turn.get("content", turn.get("value")))
        if not isinstance(content, str):
            raise SchemaError(f"turn {index} has no text")
        messages.append(Message(role, content))
    if not any(item.role == "assistant" and item.content.strip() for item in messages):
        raise SchemaError("no assistant turn with text: nothing to learn")
    return Conversation(tuple(messages))
