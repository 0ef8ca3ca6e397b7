"""Runs in a notebook: as a table where they are shown, and as pandas frames to go on with.

Whatever is shown is escaped: names may come from other parties.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fedlora.engines.record import RoundRecord
from fedlora.runs import attendance
from fedlora.runs.record import figures
from fedlora.security.privacy import Privacy
from fedlora.text import shown

if TYPE_CHECKING:
    from pandas import DataFrame

LATELY = 10  # rounds that are shown
COLUMNS = {
    "train/loss": "loss", "clients/mean": "clients' own", "clients/worst": "worst client",
    "aggregation/served": "error", "bytes_up/total": "bytes up", "bytes_down/total": "bytes down",
}  # fmt: skip


class Rounds:
    """Of whatever has a run's ``summary`` and its ``records``."""

    summary: Mapping[str, Any]
    records: Sequence[RoundRecord]

    def frame(self) -> "DataFrame":
        """A row a round, a column a figure, under the names that trackers use (docs/trackers.md); NaN where none."""
        import pandas

        rows = [{"round": record["round"], **figures(record)} for record in self.records]
        return pandas.DataFrame(rows, columns=_columns(rows, "round")).set_index("round")

    def clients_frame(self) -> "DataFrame":
        """A row a round and client: its loss where it trained, and what its own model scores where it was scored."""
        import pandas

        metric, rows = self.summary["metric"]["name"], []
        for record in self.records:
            each = record.get("clients", {}).get("each", [])
            losses = {int(client): loss for client, loss in record.get("loss", {}).items()}
            for client in sorted({*range(len(each)), *losses}):
                own = each[client] if client < len(each) else None
                rows.append({"round": record["round"], "client": client, "loss": losses.get(client), metric: own})
        return pandas.DataFrame(rows, columns=["round", "client", "loss", metric])

    def _repr_html_(self) -> str:
        summary, found = self.summary, [{"round": r["round"], **figures(r)} for r in self.records]
        names = [*COLUMNS, *(f"global/{name}" for name in (summary["metric"]["name"],))]
        there = [name for name in names if any(name in row for row in found)]
        heads = ["round", *(COLUMNS.get(name, name.replace("/", " ")) for name in there)]
        rows = [[row["round"], *(row.get(name) for name in there)] for row in found[-LATELY:]]
        title = f"{summary['title'] or summary['method']}, {summary['rounds']} rounds, seed {summary['seed']}"
        about = (
            [f"{name}: {value}" for name, value in Privacy.describe(summary["privacy"])] if "privacy" in summary else []
        )
        about += [] if attendance.whole(summary) else [f"clients' own figures are over {attendance.over(summary)}"]
        about += [f"{who} {when}" for who, when in attendance.lines(summary)]
        about += ["stopped before its end"] if summary.get("interrupted") else []
        return table(title, heads, rows, about)


def _columns(rows: Iterable[Mapping[str, Any]], first: str) -> list[str]:
    return list(dict.fromkeys([first, *(name for row in rows for name in row)]))


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], about: Sequence[str] = ()) -> str:
    """HTML of a table; every text is escaped, and control characters are written out."""
    head = "".join(f'<th scope="col">{_safe(text)}</th>' for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    below = "".join(f"<p>{_safe(text)}</p>" for text in about)
    return f"<table><caption>{_safe(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and value != int(value) else _safe(value)


def _safe(text: Any) -> str:
    return escape(shown(text))
