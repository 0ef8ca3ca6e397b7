"""Conversations: rows of chat data, in the forms of public data sets, as messages for a chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.tasks.data.rows import is_missing, read_column

Message = dict[str, Any]  # role and content, both text, and what else a chat template may write

MESSAGES, CONVERSATIONS, TOOLS = "messages", "conversations", "tools"
PAIR = ("prompt", "completion")  # two columns of messages, as in TRL
ROLES = ("system", "developer", "user", "assistant", "tool")  # of chat templates
SHAREGPT = {  # who speaks, in a column of {from, value}
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
THINKING = ("reasoning_content", "thinking")  # the keys of an answer's reasoning
THINKING_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
EXACT = ("ExactJson", "Json")  # the features that return nested values as they were written


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, and which of them are learnt."""

    messages: list[Message]
    answers: tuple[int, ...]  # the indices of the messages that are learnt
    tools: list[dict[str, Any]] | None
    where: str  # row and column, for errors

    @property
    def last_answer(self) -> str:
        """The text of the last answer, without its thinking; empty if there is none, or if it only calls tools."""
        return remove_thinking(self.messages[self.answers[-1]]["content"]).strip() if self.answers else ""

    def with_folded_system(self) -> "Conversation":
        """Return the conversation with its system messages at the beginning of the first user message."""
        messages = fold_system(self.messages)
        fewer = len(self.messages) - len(messages)
        return replace(self, messages=messages, answers=tuple(i - fewer for i in self.answers))


def find_columns(splits: Sequence[Any]) -> tuple[str, ...]:
    """Return the usual columns of chat data that the splits have: one of messages, or a prompt's and a completion's."""
    if any(MESSAGES in split.column_names for split in splits):
        return (MESSAGES,)
    for columns in ((CONVERSATIONS,), PAIR):
        if any(all(_holds_messages(split, name) for name in columns) for split in splits):
            return columns
    return ()


def _holds_messages(split: Any, name: str) -> bool:
    """Whether the first value of a column that is not empty is a list of messages."""
    if name not in split.column_names:
        return False
    first = next((value for value in split[name] if value), None)
    return isinstance(first, list) and isinstance(first[0], dict) and bool({"role", "from"} & set(first[0]))


def read_conversations(split: Any, columns: Sequence[str], tools: str | None) -> list[Conversation]:
    """Return the conversation of each row.

    With two columns, a prompt and a completion, only answers of the completion are learnt. ``tools`` is the column of
    the tools; None: ``TOOLS``, if the split has it; "": no tools. Raises ``ValueError`` with the row if it is no
    conversation.
    """
    name = (TOOLS if TOOLS in split.column_names else "") if tools is None else tools
    rows = zip(*(_read_nested_column(split, column, "task.messages") for column in columns))
    offered = _read_nested_column(split, name, "task.tools", allow_missing=True) if name else [None] * len(split)
    conversations = []
    for number, (parts, own) in enumerate(zip(rows, offered)):
        places = [f"row {number} of column {column!r} (task.messages)" for column in columns]
        several = [_read_messages(part, where) for part, where in zip(parts, places)]
        start = len(several[0][0]) if len(several) > 1 else 0
        messages = [message for some, _ in several for message in some]
        weights = [weight for _, some in several for weight in some]
        answers = tuple(i for i in range(max(start, 1), len(messages)) if weights[i] and _is_answer(messages[i]))
        definitions = _read_tools(own, f"row {number} of column {name!r} (task.tools)")
        conversations.append(Conversation(messages, answers, definitions, places[-1]))
    return conversations


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or "tool_calls" in message)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages with the system messages at their beginning written before the text of the user message that
    follows them; without such messages, the messages unchanged."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if first in (0, len(messages)) or messages[first]["role"] != "user":
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[: first + 1])
    return [{**messages[first], "content": text}, *messages[first + 1 :]]


def remove_thinking(text: str) -> str:
    """Return a text without the thinking block that it begins with."""
    match = THINKING_BLOCK.match(text)
    return text[match.end() :] if match else text


def find_thinking(message: Message) -> str:
    """Return an answer's thinking, from its own key or from the block that its content begins with; "" for none."""
    match = THINKING_BLOCK.match(message["content"])
    return str(next((message[key] for key in THINKING if key in message), match[1] if match else "")).strip()


def _read_nested_column(split: Any, name: str, key: str, allow_missing: bool = False) -> list[Any]:
    """Return a column of nested values. Arrow gives every object the keys of all; those without a value are removed."""
    values = read_column(split, name, key, allow_missing)
    is_exact = getattr(split.features[name], "_type", None) in EXACT
    return values if is_exact else [_remove_missing(value) for value in values]


def _remove_missing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _remove_missing(item) for key, item in value.items() if item is not None}
    return [_remove_missing(item) for item in value] if isinstance(value, list) else value


def _read_messages(value: Any, where: str) -> tuple[list[Message], list[bool]]:
    """Return the messages of a row, and whether each may be learnt."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(_no_messages(where))
    messages, weights = [], []
    for number, message in enumerate(value):
        place = f"message {number} in {where}"
        if "role" not in message and "from" in message:
            message = _from_sharegpt(message, place)
        if not isinstance(message.get("role"), str):
            raise ValueError(_no_messages(where))
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"{place} has the weight {weight!r}; a weight is 1 (learnt) or 0.")
        messages.append(_read_message(message, place))
        weights.append(weight != 0)
    return messages, weights


def _no_messages(where: str) -> str:
    return (
        f"{where} is no list of messages; each needs a role and a content, or in ShareGPT's form from and value; "
        "correct the row, or name another column."
    )


def _from_sharegpt(message: Mapping[str, Any], where: str) -> Message:
    """Return a message of {from, value} with role and content."""
    speaker, value = message["from"], message.get("value")
    if speaker not in SHAREGPT:
        raise ValueError(f"{where} is from {speaker!r}, which is no speaker; speakers are {', '.join(SHAREGPT)}.")
    if speaker != "function_call":
        return {**message, "role": SHAREGPT[speaker], "content": value}
    calls = _parse(value, where, "a function call")
    return {**message, "role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _read_message(message: Mapping[str, Any], where: str) -> Message:
    """Return the role and the content as text, and the other keys that chat templates know."""
    role = message["role"]
    single = message.get("function_call")  # OpenAI's older form of one call
    calls = _read_calls(message.get("tool_calls") or ([single] if single else []), where)
    if calls and role != "assistant":
        raise ValueError(f"{where} is by {role!r} and has tool calls; only 'assistant' may call tools.")
    read: Message = {"role": role, "content": _read_content(message.get("content"), bool(calls), where)}
    if calls:
        read["tool_calls"] = calls
    optional = {"assistant": THINKING, "tool": ("name", "tool_call_id")}.get(role, ())
    for key in optional:
        value = message.get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"{where} has a {key} that is no text: {value!r:.60}; correct it or leave it out.")
        read |= {key: value} if value else {}
    return read


def _read_content(content: Any, calls: bool, where: str) -> str:
    """Return a content as text: a text, parts of text, or nothing beside tool calls."""
    if content is None and calls:
        return ""
    if content is None:
        raise ValueError(f"{where} has neither a content nor tool calls; correct or drop the row.")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise ValueError(f"{where} has the content {content!r:.60}; a content is text, or parts with a type.")
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part of type {part['type']!r}; only parts with text can be read.")
    return "".join(part["text"] for part in content)


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, with the arguments as an object, as chat templates write them."""
    if not isinstance(calls, list):
        raise ValueError(f"{where} has tool_calls that are no list: {calls!r:.60}.")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where} has a tool call without a name: {call!r:.60}; it needs a name and arguments.")
        arguments = function.get("arguments")
        arguments = _parse(arguments, where, "a tool call's arguments") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict | None):
            raise ValueError(f"{where} has tool arguments that are no JSON object: {arguments!r:.60}.")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}, **own})
    return read


def _read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the definitions of a row's tools in OpenAI's form; None for no tools."""
    tools = _parse(value, where, "a list of tools") if isinstance(value, str) and value.strip() else value
    if not tools or is_missing(tools):
        return None
    listed = tools if isinstance(tools, list) else [tools]
    forms = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in listed]
    if listed is not tools or not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in forms):
        raise ValueError(
            f"{where} is no list of tools, each with a name: {value!r:.60}; name another column, or set "
            'task.tools = "" to leave it out.'
        )
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _parse(text: Any, where: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has {kind} that is no JSON: {text!r:.60}; correct or drop the row.") from error
