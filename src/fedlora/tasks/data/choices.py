"""Multiple choice: the choices of each row, its right one, and every choice as tokens after its prompt."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.tasks.data.rows import is_missing, read_column, read_named_column
from fedlora.tasks.data.templates import PromptTemplate, template_columns
from fedlora.tasks.data.tokens import encode, flatten_rows

Style = Literal["text", "label"]

TEXTS, RIGHT = "task.choices: texts", "task.choices: right"  # columns that ``write_choices`` adds
FORMAT = re.compile(r"answer format:\s*(\S+(?:/\S+)+)", re.IGNORECASE)  # in the instructions of Commonsense-170k
KINDS = {"label": "the label of a choice", "text": "the text of a choice", "position": "a position that counts from 0"}


@dataclass(frozen=True)
class Choices:
    """The choices of one row."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]  # A, B, C, ... or those of the data
    are_numbers: bool = False  # whether the texts were numbers in the data
    are_labelled: bool = False  # whether the labels are of the data

    def find(self, answer: Any, kind: str) -> int | None:
        """Return the place of an answer that is one of ``KINDS``; None if it is not among the choices."""
        text = str(answer).strip()
        if isinstance(answer, bool):
            places = [i for i, x in enumerate(self.texts) if x.casefold() == text.casefold()]
            return places[0] if kind == "text" and len(places) == 1 else None
        if kind == "position":
            fits = text.isdecimal() and int(text) < len(self.texts) and not self.are_labelled
            return int(text) if fits else None
        if kind == "text" and isinstance(answer, int | float) and not self.are_numbers:
            return None  # a number is a position, or the label of a choice
        names = self.labels if kind == "label" else self.texts
        return names.index(text) if text in names else None


def write_choices(split: Any, choices: str | Sequence[str], answer: str, style: Style, role: str) -> Any:
    """Return a split whose column ``answer`` has the right choice, as its text or its label.

    ``choices`` is a column or the choices of every row. A column of lists is rewritten as lines, such as "A. red", for
    the prompt. The columns ``TEXTS`` and ``RIGHT`` are added for ``encode_choices``. Raises ``ValueError`` if a row has
    fewer than two choices, or if its answer is not one of them.
    """
    rows = _read_rows(split, choices, role)
    right = _find_answers(read_named_column(split, answer, "task.answer_column"), rows, answer, role)
    written = [row.texts if style == "text" else row.labels for row in rows]
    new = {answer: [names[i] for names, i in zip(written, right)]}
    if isinstance(choices, str) and not isinstance(split[choices][0], str):
        new[choices] = ["\n".join(f"{name}. {text}" for name, text in zip(row.labels, row.texts)) for row in rows]
    # Added first, because a split without columns has no rows.
    split = split.add_column(TEXTS, list(map(list, written))).add_column(RIGHT, right)
    split = split.remove_columns([name for name in new if name in split.column_names])
    for name, values in new.items():
        split = split.add_column(name, values)
    return split


def check_style(style: Style, choices: str | Sequence[str], template: PromptTemplate, answer: str) -> None:
    """Raise ``ValueError`` unless the response has the answer, and unless labels are explained by the prompt."""
    if answer not in template_columns(template.response):
        raise ValueError(
            f"{template.keys[1]} is {template.response!r}, which does not name the column of the answers, {answer!r}; "
            f"write {{{answer}}} where each choice belongs."
        )
    if style == "label" and choices not in template_columns(template.prompt):
        raise ValueError(
            "task.choice_style is 'label', but task.prompt does not show the choices with their labels; set "
            "task.choices to a column of lists and write it into task.prompt, e.g. {choices}, or take 'text'."
        )


def _read_rows(split: Any, choices: str | Sequence[str], role: str) -> list[Choices]:
    if not isinstance(choices, str):
        return [_label(tuple(choices), "task.choices")] * len(split)
    values = read_column(split, choices, "task.choices")
    kinds = {isinstance(value, str) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"column {choices!r} (task.choices) holds texts and lists in the {role} rows; write lists.")
    return [_read_row(value, _locate(choices, "task.choices", role, i)) for i, value in enumerate(values)]


def _locate(column: str, key: str, role: str, row: int) -> str:
    return f"column {column!r} ({key}) in row {row} of the {role} rows"


def _read_row(value: Any, where: str) -> Choices:
    """Return the choices of a list, of ARC's ``{text, label}``, or of an instruction of Commonsense-170k."""
    if isinstance(value, str):
        named = FORMAT.findall(value)
        if not named:
            raise ValueError(f"{where} is a text without 'Answer format: a/b/c'; a list of choices is needed.")
        return _label(tuple(named[-1].rstrip(".").split("/")), where)
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value) and value:
        value = {key: [item.get(key) for item in value] for key in ("text", "label")}
    labels = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or not all(isinstance(x, str | int | float) and not is_missing(x) for x in value):
        raise ValueError(f"{where} holds {value!r}; it must be a list of texts, or text and label with a list each.")
    return _label(tuple(str(x).strip() for x in value), where, labels, not any(isinstance(x, str) for x in value))


def _label(texts: tuple[str, ...], where: str, labels: Sequence[Any] | None = None, numbers: bool = False) -> Choices:
    if len(texts) < 2:
        raise ValueError(f"{where} has {len(texts)} choice{'s' * (len(texts) != 1)}; at least 2 are needed.")
    if not all(text.strip() for text in texts):
        raise ValueError(f"{where} has an empty choice; write a text, or leave the row out.")
    are_labelled = labels is not None
    if labels is None:
        labels = [ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(len(texts))]
    names = tuple(str(label).strip() for label in labels)
    if len(names) != len(texts) or len(set(names)) < len(names):
        raise ValueError(f"{where} has the labels {', '.join(names)} for {len(texts)} choices; each needs its own.")
    return Choices(texts, names, numbers, are_labelled)


def _find_answers(answers: Sequence[Any], rows: Sequence[Choices], column: str, role: str) -> list[int]:
    """Return the place of each row's right choice. All answers of a split are read as one kind."""
    places = {kind: [row.find(x, kind) for x, row in zip(answers, rows)] for kind in KINDS}
    full = {kind: [i for i in found if i is not None] for kind, found in places.items() if None not in found}
    if not full:
        kind = min(KINDS, key=lambda name: places[name].count(None))
        i = places[kind].index(None)
        mixed = [KINDS[other] for other in KINDS if places[other][i] is not None]
        if mixed and places[kind].count(None) < len(answers):
            reason = f"which is {mixed[0]}, while in other rows it is {KINDS[kind]}; write all answers alike"
        else:
            reason = f"which is none of the choices {', '.join(map(repr, rows[i].texts))}; correct or drop the row"
        raise ValueError(f"{_locate(column, 'task.answer_column', role, i)} holds {answers[i]!r}, {reason}.")
    (first, found), *others = full.items()
    for kind, other in [] if first == "label" and all(row.are_labelled for row in rows) else others:
        unequal = [i for i, (a, b) in enumerate(zip(found, other)) if a != b]
        if unequal:
            i = unequal[0]
            raise ValueError(
                f"{_locate(column, 'task.answer_column', role, i)} holds {answers[i]!r}, which is {KINDS[first]} "
                f"and also {KINDS[kind]}; write the text of the right choice in every row."
            )
    return found


def encode_choices(
    test: Any, template: PromptTemplate, answer: str, before: Sequence[str], tokenizer: Any, context: int
) -> tuple[dict[str, Tensor], str]:
    """Return every choice of the test rows as tokens after its prompt, as features.

    ``test`` is a split of ``write_choices``, and ``before`` has each row's solved examples. A choice is the response
    with the choice in the column ``answer``, without an end token. Prompts that leave no room within ``context`` tokens
    lose their beginning; the second value is a note with their number.
    """
    options = test[TEXTS]
    counts = torch.tensor([len(texts) for texts in options])
    rows = torch.arange(len(test)).repeat_interleave(counts).tolist()
    texts = [text for several in options for text in several]
    split = test.select(rows).remove_columns([answer]).add_column(answer, texts)
    segments = [
        [(before[i] + ask, False), (say, True)] for i, ((ask, _), (say, _)) in zip(rows, template.segment_rows(split))
    ]
    tokens = encode(segments, tokenizer, special=True, end=False)
    prompts, choices, longer = [], [], set[int]()
    longest = Counter[int]()
    for i, row in zip(rows, tokens):
        longest[i] = max(longest[i], sum(row.learnt))
    for i, row in zip(rows, tokens):
        size = sum(row.learnt)
        prompt, room = row.ids[: len(row.ids) - size], context - longest[i]
        if room < 1 or not size or not prompt:
            raise ValueError(
                f"row {i} of the test rows has {len(prompt)} tokens of a prompt and a choice of {size} tokens; "
                f"each needs at least one, and the model reads {context}: drop the row, or write shorter choices."
            )
        if len(prompt) > room:
            longer.add(i)
            first = int(prompt[0] == tokenizer.bos_token_id and room > 1)
            prompt = prompt[:first] + prompt[len(prompt) - room + first :]
        prompts.append(prompt)
        choices.append(row.ids[len(row.ids) - size :])
    ids, offsets = flatten_rows([prompt + choice for prompt, choice in zip(prompts, choices)])
    note = (
        f"{len(longer)} of {len(test)} prompts and choices were longer than {context} tokens and lost their beginning."
    )
    return {
        "choice_ids": ids,
        "choice_offsets": offsets,
        "choice_tokens": torch.tensor([len(choice) for choice in choices]),
        "choice_characters": torch.tensor([len(text) for text in texts]),
        "choice_rows": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        "choice_right": torch.tensor(test[RIGHT]),
    }, note if longer else ""


@dataclass(frozen=True)
class Sequences:
    """Distinct sequences of tokens that cover some rows' choices, and where each choice is in them."""

    ids: list[list[int]]
    number: list[int]  # of the sequence of each choice
    spans: list[tuple[int, list[int]]]  # each choice's first position and its tokens


def cover_choices(features: Mapping[str, Tensor], rows: Tensor) -> Sequences:
    """Return few sequences for all choices of some rows.

    A sequence ends before the last token of its choice, which is only predicted. So choices of one token after the same
    prompt share a sequence, and a choice whose sequence begins a longer one shares that.
    """
    ids: list[list[int]] = []
    number: list[int] = []
    spans: list[tuple[int, list[int]]] = []
    offsets, places = features["choice_offsets"], features["choice_rows"]
    for row in rows.tolist():
        first = len(ids)
        several = range(int(places[row]), int(places[row + 1]))
        whole = {k: features["choice_ids"][offsets[k] : offsets[k + 1]].tolist() for k in several}
        shared: dict[int, int] = {}
        for k in sorted(several, key=lambda k: -len(whole[k])):
            begin = whole[k][:-1]
            shared[k] = next((i for i in range(first, len(ids)) if ids[i][: len(begin)] == begin), len(ids))
            if shared[k] == len(ids):
                ids.append(begin)
        for k in several:
            size = int(features["choice_tokens"][k])
            number.append(shared[k])
            spans.append((len(whole[k]) - size - 1, whole[k][len(whole[k]) - size :]))
    return Sequences(ids, number, spans)


# (ids (b t), mask (b t), positions (n,) in b * t, tokens (n,)) -> the cross-entropy of each token at its position (n,)
Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def log_likelihoods(score: Score, sequences: Sequences, pad: int, size: int) -> Tensor:
    """Return the log-likelihood of each choice given its prompt, float64, from ``size`` sequences at a time."""
    by_sequence: dict[int, list[int]] = {}
    for k, i in enumerate(sequences.number):
        by_sequence.setdefault(i, []).append(k)
    result = torch.zeros(len(sequences.spans), dtype=torch.float64)
    order = sorted(by_sequence, key=lambda i: len(sequences.ids[i]))  # similar lengths together: less padding
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        width = max(len(sequences.ids[i]) for i in chunk)
        ids = torch.tensor([sequences.ids[i] + [pad] * (width - len(sequences.ids[i])) for i in chunk])
        mask = torch.tensor([[1] * len(sequences.ids[i]) + [0] * (width - len(sequences.ids[i])) for i in chunk])
        owners, positions, tokens = list[int](), list[int](), list[int]()
        for place, i in enumerate(chunk):
            for k in by_sequence[i]:
                begin, own = sequences.spans[k]
                owners += [k] * len(own)
                positions += range(place * width + begin, place * width + begin + len(own))
                tokens += own
        nll = score(ids, mask, torch.tensor(positions), torch.tensor(tokens))
        result.index_add_(0, torch.tensor(owners), -nll.double().cpu())
    return result


def grade_choices(values: Tensor, features: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return whether the likeliest choice of each row is the right one, and the same per character (b, 2), float64.

    ``values`` are the log-likelihoods of the rows' choices, one row after another. Of equal ones the first counts.
    """
    places, characters, right = (features[f"choice_{name}"] for name in ("rows", "characters", "right"))
    counts = (places[rows + 1] - places[rows]).tolist()
    hits = []
    for row, several in zip(rows.tolist(), values.split(counts)):
        normal = several / characters[places[row] : places[row + 1]]
        hits.append([float(x.argmax() == right[row]) for x in (several, normal)])
    return torch.tensor(hits, dtype=torch.float64).reshape(-1, 2)
