"""What a row says to a language model: stretches of text, and which of them it is to learn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from fedlora.tasks.data import rows as source

Segment = tuple[str, bool]  # some text, and whether it is learnt
# Columns of public sets, tried in this order where nothing is named: what is asked, and what is answered.
USUAL = (
    ("### Instruction:\n{instruction}\n\n### Context:\n{context}\n\n### Response:\n", "{response}"),  # Dolly
    ("### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n", "{output}"),  # Alpaca
    ("### Instruction:\n{instruction}\n\n### Response:\n", "{response}"),
    ("### Instruction:\n{instruction}\n\n### Response:\n", "{output}"),
    ("Question: {question}\nAnswer:", " {answer}"),
    ("{prompt}", "{completion}"),
    ("{prompt}", "{response}"),
    ("Q: {input}\nA:", " {target}"),
)
MESSAGES, TEXT = "messages", "text"


@dataclass(frozen=True)
class PromptTemplate:
    """Templates for a prompt and its response; ``response`` alone for plain text."""

    prompt: str
    response: str
    keys: tuple[str, str] = ("task.prompt", "task.response")

    def __post_init__(self):
        for key, template in zip(self.keys, (self.prompt, self.response)):
            checked(template, key)
        if not columns(self.response):
            raise ValueError(f"{self.keys[1]} is {self.response!r}, which names no column; write {{column}}.")

    def rows(self, split: Any, blank: bool = False) -> list[list[Segment]]:
        """Each row's prompt and response; ``blank`` lets responses be empty.

        ``ValueError`` names a column that is not there or holds no text.
        """
        prompts = filled(self.prompt, split, self.keys[0])
        responses = filled(self.response, split, self.keys[1], optional=True)
        empty = sum(not text.strip() for text in responses)
        if empty and not blank:
            raise ValueError(
                f"{self.keys[1]} is empty in {empty} of {len(responses)} rows; drop these rows, or set "
                "task.drop_unlearnable = true."
            )
        return [[(prompt, False), (response, True)] for prompt, response in zip(prompts, responses)]

    def asked(self, text: str) -> str:
        """A prompt of somebody's own: the text in the place of the template's first column, the others empty."""
        names = columns(self.prompt)
        return fill(self.prompt, {name: text if name == names[0] else "" for name in names}) if names else text


def chosen(there: Sequence[str], prompt: str | None, response: str | None, text: str | None) -> PromptTemplate:
    """What is named, or else the first of the usual names that the data has."""
    if text is not None:
        return PromptTemplate("", template(text), ("task.prompt", "task.text"))
    if prompt is not None and response is not None:
        return PromptTemplate(template(prompt, "\n"), template(response))
    for usual in USUAL:
        if set(columns(usual[0] + usual[1])) <= set(there):
            return PromptTemplate(*usual)
    if TEXT in there:
        return PromptTemplate("", "{text}", ("task.prompt", "task.text"))
    raise ValueError(
        f"no prompt and response were found among {', '.join(there)}; set task.prompt and task.response, "
        "task.messages or task.text to some of them."
    )


def template(named: str, after: str = "") -> str:
    """What is written as it is; a column's bare name stands for its text, and ``after``."""
    return named if "{" in named else f"{{{named}}}{after}"


def checked(template: str, key: str) -> str:
    """The template, or ``ValueError`` where its braces do not match."""
    try:
        columns(template)
    except ValueError as error:
        raise ValueError(
            f"{key} is {template!r}, whose braces do not match; write {{column}}, and {{{{ for a brace."
        ) from error
    return template


def columns(template: str) -> list[str]:
    """The columns that a template names, in order."""
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


def filled(template: str, split: Any, key: str, optional: bool = False) -> list[str]:
    """The template with each row's values in it; a value that is missing is an empty text.

    ``ValueError`` where a row has none of the template's columns, unless that is ``optional``.
    """
    names = columns(template)
    rows = list(zip(*(source.named(split, name, key, gaps=True) for name in names))) if names else [()] * len(split)
    lacking = sum(all(map(source.is_missing, row)) for row in rows) if names else 0
    if lacking and not optional:
        several = f"columns {', '.join(map(repr, names))} ({key}) are all missing in {lacking} of {len(rows)} rows"
        one = f"column {names[0]!r} ({key}) has {lacking} missing values in {len(rows)} rows"
        raise ValueError(f"{one if len(names) == 1 else several}; fill or drop them.")
    return [fill(template, {name: _text(value, name, key) for name, value in zip(names, row)}) for row in rows]


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with values in it; a paragraph whose columns are all empty is left out."""
    paragraphs = re.split(r"(\n\n)", template)
    kept: list[str] = []
    for paragraph, gap in zip(paragraphs[::2], [*paragraphs[1::2], ""]):
        names = columns(paragraph)
        if not names or any(values[name].strip() for name in names):
            parts = (
                word + (values[name] if name is not None else "") for word, name, _, _ in Formatter().parse(paragraph)
            )
            kept += ["".join(parts), gap]
    return "".join(kept)


def _text(value: Any, name: str, key: str) -> str:
    if source.is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"column {name!r} ({key}) holds {value!r}, which is not text; name a text column.")


def strata(train: Any, test: Any, label: str | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both splits' values of a column as numbers from 0, for partitions by label; None where no column is named."""
    if label is None:
        return None, None
    both = [list(map(str, source.named(split, label, "task.label"))) for split in (train, test)]
    order = {name: i for i, name in enumerate(sorted({*both[0], *both[1]}))}
    return torch.tensor([order[v] for v in both[0]]), torch.tensor([order[v] for v in both[1]])


def selected(kept: Sequence[bool], split: Any, *lists: list[Any]) -> tuple[Any, ...]:
    """The rows of a split that are kept, and those of lists as long."""
    some = split.select([i for i, keep in enumerate(kept) if keep])
    return some, *([x for x, keep in zip(rows, kept) if keep] for rows in lists)


def left_out(count: int, kept: int, what: str, advice: str) -> str:
    """A sentence on rows that were dropped, or nothing. ``ValueError`` with ``advice`` where none is kept."""
    if not kept:
        raise ValueError(f"nothing is left to learn in any of the {count} {what} rows{advice}.")
    return f"{count - kept} of {count} {what} rows were left out: nothing is left to learn in them." * (kept < count)


def conversations(split: Any, name: str, tokenizer: Any, blank: bool = False) -> list[list[Segment]]:
    """Each row's messages in the tokenizer's chat template; what assistants say is learnt.

    ``blank`` lets a row have nothing to learn: it has no text then.

    ``ValueError`` where the tokenizer has no template, a row has no such messages, or the template says earlier turns
    otherwise when later ones follow.
    """
    needs_template(tokenizer)
    return [
        _stretches(messages, tokenizer, f"row {number} of column {name!r} (task.messages)", blank)
        for number, messages in enumerate(source.column(split, name, "task.messages"))
    ]


def needs_template(tokenizer: Any) -> None:
    """``ValueError`` where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which messages need; take a model that "
            "was made for chats, set task.chat_template, or set task.prompt and task.response instead."
        )


def _stretches(messages: Any, tokenizer: Any, where: str, blank: bool) -> list[Segment]:
    form = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not form:
        raise ValueError(f"{where} is no list of messages; each needs a role and a content, both text.")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]  # what is answered
    if not turns and not blank:
        raise ValueError(
            f"{where} has no message by 'assistant' that answers another, so nothing to learn; drop it, or set "
            "task.drop_unlearnable = true."
        )
    done, found = "", list[Segment]()
    for i in turns:
        before, after = rendered(messages[:i], tokenizer, where, True), rendered(messages[: i + 1], tokenizer, where)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} writes earlier turns of {where} otherwise when later "
                "ones follow; set another task.chat_template, or task.prompt and task.response."
            )
        found += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return found


def rendered(messages: Sequence[Mapping[str, str]], tokenizer: Any, where: str, ask: bool = False) -> str:
    """Messages as text; with ``ask``, up to where the assistant begins."""
    from jinja2.exceptions import TemplateError

    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise ValueError(f"the chat template does not take {where}: {str(error).rstrip('.')}.") from error
