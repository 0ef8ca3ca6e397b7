"""Chat templates: conversations as segments of text, of which the assistant's answers are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.tasks.data.conversations import ROLES, Conversation, Message, find_thinking, fold_system
from fedlora.tasks.data.templates import Segment

Turns = Literal["all", "last"]
PROBE = "qzprobe{}qz"  # in place of a text, to see whether a template writes it
INSTEAD = "set another task.chat_template, or task.prompt and task.response instead of messages"


@dataclass
class ChatRenderer:
    """Writes conversations in the chat template of a tokenizer, and counts what has to be said about them."""

    tokenizer: Any
    turns: Turns = "all"  # whether all answers of a conversation are learnt, or the last one
    allow_empty: bool = False  # return no segments for a conversation without answers, instead of an error
    takes_system: bool = field(init=False)  # whether the template writes system messages
    folded: int = field(init=False, default=0)  # conversations with system messages in the first user message
    split: int = field(init=False, default=0)  # conversations that became several samples
    thoughtless: int = field(init=False, default=0)  # conversations with thinking that the template leaves out
    _checked: set[tuple[Any, ...]] = field(init=False, default_factory=set)  # forms of conversations

    def __post_init__(self) -> None:
        check_chat_template(self.tokenizer)
        self.takes_system = takes_system(self.tokenizer)

    def render(self, conversation: Conversation) -> list[list[Segment]]:
        """Return the samples of a conversation.

        There is one, or several if the template writes earlier turns otherwise when later ones follow: each answer
        then has the text before it that the model would read when it generates that answer.
        """
        if not conversation.answers:
            self._check_roles(conversation)
            return [[]]
        if not self.takes_system:
            unfolded, conversation = conversation, conversation.with_folded_system()
            self.folded += len(conversation.messages) < len(unfolded.messages)
        answers = conversation.answers if self.turns == "all" else conversation.answers[-1:]
        samples, done, thoughtless = list[list[Segment]](), "", False
        for i in answers:
            before, after = self._render_answer(conversation, i)
            answer = (after[len(before) :], True)
            if samples and before.startswith(done):
                samples[-1] += [(before[len(done) :], False), answer]
            else:
                samples.append([(before, False), answer])
            thoughtless |= find_thinking(conversation.messages[i]) not in answer[0]
            done = after
        self._check_form(conversation, answers[-1])
        self.split += len(samples) > 1
        self.thoughtless += thoughtless
        return samples

    def _render_answer(self, conversation: Conversation, i: int) -> tuple[str, str]:
        """Return the text that the model reads before it writes answer ``i``, and the text up to its end."""
        messages, where, tools = conversation.messages, conversation.where, conversation.tools
        before = render_messages(messages[:i], self.tokenizer, where, True, tools)
        after = render_messages(messages[: i + 1], self.tokenizer, where, tools=tools)
        if not after.startswith(before):
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} writes earlier turns of {where}, or the "
                f"beginning of an answer, otherwise when the answer follows, so it cannot be learnt; {INSTEAD}."
            )
        return before, after

    def _check_roles(self, conversation: Conversation) -> None:
        """Raise ``ValueError`` for a conversation without answers, unless that is allowed and its roles are usual."""
        odd = [message["role"] for message in conversation.messages if message["role"] not in ROLES]
        if not self.allow_empty:
            raise ValueError(
                f"{conversation.where} has no message by 'assistant' that answers another, so nothing to learn; drop "
                "it, or set task.drop_unlearnable = true."
            )
        if odd:
            raise ValueError(
                f"{conversation.where} has no answer by 'assistant', but a message by {odd[0]!r}; roles are "
                f"{', '.join(ROLES)}: correct the row."
            )

    def _check_form(self, conversation: Conversation, last: int) -> None:
        """Raise ``ValueError`` if the template leaves out some message, tool call or tool up to an answer.

        It is checked once for conversations with the same roles and kinds of messages.
        """
        messages = conversation.messages[: last + 1]
        form = (bool(conversation.tools), *map(_form, messages))
        if form in self._checked:
            return
        probes, tools = dict[str, str](), conversation.tools
        messages = [_probe_message(message, probes) for message in messages]
        if tools:
            tools = [*tools[:-1], {**tools[-1], "function": {**tools[-1]["function"], "name": PROBE.format("tools")}}]
            probes[PROBE.format("tools")] = "the tools"
        text = render_messages(messages, self.tokenizer, conversation.where, tools=tools)
        missing = next((kind for probe, kind in probes.items() if probe not in text), None)
        if missing is not None:
            remedy = ', or task.tools = ""' if missing == "the tools" else ""
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} leaves {missing} of {conversation.where} out; "
                f"set another task.chat_template{remedy}."
            )
        self._checked.add(form)

    def notes(self, rows: int, samples: int, role: str) -> list[str]:
        """Return notes about ``rows`` conversations that became ``samples``."""
        several = f"of {rows} {role} rows"
        notes = [
            (self.folded, "have a system message, which the chat template does not take: it is written at the "
             "beginning of the first user message."),
            (self.split, "have several answers and a chat template that writes earlier turns otherwise when later ones "
             f"follow: they are learnt in samples of their own, {samples} in all (task.turns)."),
            (self.thoughtless, "have thinking that the chat template leaves out of the answers that are learnt."),
        ]  # fmt: skip
        return [f"{count} {several} {text}" for count, text in notes if count]


def _form(message: Message) -> tuple[Any, ...]:
    """Return what a template may go by, other than the texts."""
    texts = [key for key, value in message.items() if key != "role" and value]
    return (message["role"], *texts, len(message.get("tool_calls", ())))


def _probe_message(message: Message, probes: dict[str, str]) -> Message:
    """Return the message with probes as content and as names of its calls; adds what they stand for to ``probes``."""

    def add(kind: str) -> str:
        probe = PROBE.format(len(probes))
        probes[probe] = kind
        return probe

    probed = dict(message)
    if message["content"].strip():
        probed["content"] = add(f"a message by {message['role']!r}")
    if "tool_calls" in message:
        probed["tool_calls"] = [
            {**call, "function": {**call["function"], "name": add("a tool call")}} for call in message["tool_calls"]
        ]
    return probed


def takes_system(tokenizer: Any) -> bool:
    """Return whether the chat template writes system messages; some refuse them, and some leave them out."""
    system, user = {"role": "system", "content": PROBE.format(0)}, {"role": "user", "content": PROBE.format(1)}
    try:
        return system["content"] in render_messages([system, user], tokenizer, "a system message", True)
    except ValueError:
        return False


def prepare_messages(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """Return messages as they were in training: without system messages, if the chat template does not take them."""
    return list(messages) if takes_system(tokenizer) else fold_system(messages)


def check_chat_template(tokenizer: Any) -> None:
    """Raise ``ValueError`` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which messages need; take a model that "
            "was made for chats, set task.chat_template, or set task.prompt and task.response instead."
        )


def render_messages(
    messages: Sequence[Message], tokenizer: Any, where: str, ask: bool = False, tools: Any = None
) -> str:
    """Return messages as text; with ``ask``, including the beginning of the assistant's turn."""
    from jinja2.exceptions import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=ask)
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take {where}: {str(error).rstrip('.')}.") from error
