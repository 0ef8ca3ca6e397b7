"""Prompt templates: rows of a data set as segments of text, some of which are learnt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from fedlora.tasks.data.rows import is_missing, read_named_column

Segment = tuple[str, bool]  # some text, and whether it is learnt
# The prompts and responses of public data sets, tried in this order if no column is set.
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
TEXT = "text"


@dataclass(frozen=True)
class PromptTemplate:
    """Templates for a prompt and its response; the prompt is empty for plain text."""

    prompt: str
    response: str
    keys: tuple[str, str] = ("task.prompt", "task.response")  # the settings that they come from

    def __post_init__(self) -> None:
        for key, template in zip(self.keys, (self.prompt, self.response)):
            check_template(template, key)
        if not template_columns(self.response):
            raise ValueError(f"{self.keys[1]} is {self.response!r}, which names no column; write {{column}}.")

    def segment_rows(self, split: Any, allow_empty: bool = False) -> list[list[Segment]]:
        """Return each row's prompt and response. Unless ``allow_empty``, an empty response is a ``ValueError``."""
        prompts = fill_rows(self.prompt, split, self.keys[0])
        responses = fill_rows(self.response, split, self.keys[1], allow_missing=True)
        empty = sum(not text.strip() for text in responses)
        if empty and not allow_empty:
            raise ValueError(
                f"{self.keys[1]} is empty in {empty} of {len(responses)} rows; drop these rows, or set "
                "task.drop_unlearnable = true."
            )
        return [[(prompt, False), (response, True)] for prompt, response in zip(prompts, responses)]

    def fill_prompt(self, text: str) -> str:
        """Return the prompt with ``text`` in its first column and the other columns empty."""
        names = template_columns(self.prompt)
        return fill(self.prompt, {name: text if name == names[0] else "" for name in names}) if names else text


def choose_template(names: Sequence[str], prompt: str | None, response: str | None, text: str | None) -> PromptTemplate:
    """Return the templates of the settings, or else the first usual ones whose columns are among ``names``."""
    if text is not None:
        return PromptTemplate("", to_template(text), ("task.prompt", "task.text"))
    if prompt is not None and response is not None:
        return PromptTemplate(to_template(prompt, "\n"), to_template(response))
    for usual in USUAL:
        if set(template_columns(usual[0] + usual[1])) <= set(names):
            return PromptTemplate(*usual)
    if TEXT in names:
        return PromptTemplate("", "{text}", ("task.prompt", "task.text"))
    raise ValueError(
        f"no prompt and response were found among {', '.join(names)}; set task.prompt and task.response, "
        "task.messages or task.text to some of them."
    )


def to_template(setting: str, after: str = "") -> str:
    """Return a setting that is a template unchanged; a column's name becomes a template of it and ``after``."""
    return setting if "{" in setting else f"{{{setting}}}{after}"


def check_template(template: str, key: str) -> None:
    """Raise ``ValueError`` if the template's braces do not match."""
    try:
        template_columns(template)
    except ValueError as error:
        raise ValueError(
            f"{key} is {template!r}, whose braces do not match; write {{column}}, and {{{{ for a brace."
        ) from error


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names, in order."""
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


def fill_rows(template: str, split: Any, key: str, allow_missing: bool = False) -> list[str]:
    """Return the template with each row's values; a missing value is an empty text.

    Unless ``allow_missing``, a row without any of the template's columns is a ``ValueError``.
    """
    names = template_columns(template)
    if not names:
        return [fill(template, {})] * len(split)
    rows = list(zip(*(read_named_column(split, name, key, allow_missing=True) for name in names)))
    missing = sum(all(map(is_missing, row)) for row in rows)
    if missing and not allow_missing:
        several = f"columns {', '.join(map(repr, names))} ({key}) are all missing in {missing} of {len(rows)} rows"
        single = f"column {names[0]!r} ({key}) has {missing} missing values in {len(rows)} rows"
        raise ValueError(f"{single if len(names) == 1 else several}; fill or drop them.")
    return [fill(template, {name: _to_text(value, name, key) for name, value in zip(names, row)}) for row in rows]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with values; a paragraph is left out if all its columns are empty."""
    paragraphs = re.split(r"(\n\n)", template)
    parts: list[str] = []
    for paragraph, gap in zip(paragraphs[::2], [*paragraphs[1::2], ""]):
        names = template_columns(paragraph)
        if not names or any(values[name].strip() for name in names):
            for literal, name, _, _ in Formatter().parse(paragraph):
                parts += [literal, "" if name is None else values[name]]
            parts.append(gap)
    return "".join(parts)


def _to_text(value: Any, name: str, key: str) -> str:
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    chat = "set task.messages if it holds chat messages" if isinstance(value, list) else "name a text column"
    raise ValueError(f"column {name!r} ({key}) holds {value!r:.200}, which is not text; {chat}.")


def label_strata(train: Any, test: Any, label: str | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return both splits' values of a column, numbered from 0, for partitions by label; None without a column."""
    if label is None:
        return None, None
    both = [list(map(str, read_named_column(split, label, "task.label"))) for split in (train, test)]
    order = {name: i for i, name in enumerate(sorted({*both[0], *both[1]}))}
    return torch.tensor([order[v] for v in both[0]]), torch.tensor([order[v] for v in both[1]])


def select_rows(keep: Sequence[bool], split: Any, *lists: list[Any]) -> tuple[Any, ...]:
    """Return the rows of a split for which ``keep`` is true, and the same items of lists."""
    indices = [i for i, is_kept in enumerate(keep) if is_kept]
    return split.select(indices), *([items[i] for i in indices] for items in lists)


def dropped_note(count: int, left: int, role: str, advice: str) -> str:
    """Return a note about rows that were dropped, or "". Raises ``ValueError`` with ``advice`` if none is left."""
    if not left:
        raise ValueError(f"nothing is left to learn in any of the {count} {role} rows{advice}.")
    return f"{count - left} of {count} {role} rows were left out: nothing is left to learn in them." * (left < count)
