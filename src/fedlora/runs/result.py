"""A run in a notebook: shown as a table, and as pandas frames."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.engines.record import RoundRecord
from fedlora.runs import attendance
from fedlora.runs.record import figures
from fedlora.runs.table import Column, Table, to_html
from fedlora.security.privacy import Privacy

if TYPE_CHECKING:
    from pandas import DataFrame

LATELY = 10  # rounds that are shown
COLUMNS = (
    Column("round", "round", 0), Column("train/loss", "loss", 4), Column("clients/mean", "clients' own", 4),
    Column("clients/worst", "worst client", 4), Column("aggregation/served", "error", 5),
    Column("bytes_up/total", "bytes up", 0), Column("bytes_down/total", "bytes down", 0),
)  # fmt: skip


class Rounds:
    """Of whatever has a run's ``summary`` and its ``records``."""

    summary: Mapping[str, Any]
    records: Sequence[RoundRecord]

    def frame(self) -> "DataFrame":
        """A row a round, a column a figure, under the names that trackers use (docs/trackers.md); NaN where none."""
        import pandas

        rows = [{"round": record["round"], **figures(record)} for record in self.records]
        columns = list(dict.fromkeys(["round", *(name for row in rows for name in row)]))
        return pandas.DataFrame(rows, columns=columns).set_index("round")

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
        summary, metric = self.summary, self.summary["metric"]["name"]
        rows = [{"round": r["round"], **figures(r)} for r in self.records]
        columns = (*COLUMNS, Column(f"global/{metric}", f"global {metric}", 4))
        there = tuple(column for column in columns if any(column.key in row for row in rows))
        title = f"{summary['title'] or summary['method']}, {summary['rounds']} rounds, seed {summary['seed']}"
        about = (
            [f"{name}: {value}" for name, value in Privacy.describe(summary["privacy"])] if "privacy" in summary else []
        )
        about += [] if attendance.whole(summary) else [f"clients' own figures are over {attendance.over(summary)}"]
        about += [f"{who} {when}" for who, when in attendance.lines(summary)]
        about += ["stopped before its end"] if summary.get("interrupted") else []
        return to_html(Table("rounds", title, there, rows[-LATELY:]), below=about)
