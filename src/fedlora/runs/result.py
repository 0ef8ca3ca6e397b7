"""A run in a notebook: a table, and pandas data frames."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.engines.record import RoundRecord
from fedlora.runs.attendance import describe_scored_clients, fault_lines, is_complete
from fedlora.runs.record import round_figures
from fedlora.runs.table import Column, Table, to_html
from fedlora.security.privacy import Privacy

if TYPE_CHECKING:
    from pandas import DataFrame

LATEST = 10  # rounds in the table
COLUMNS = (
    Column("round", "round", 0), Column("train/loss", "loss", 4), Column("clients/mean", "clients' own", 4),
    Column("clients/worst", "worst client", 4), Column("aggregation/served", "error", 5),
    Column("bytes_up/total", "bytes up", 0), Column("bytes_down/total", "bytes down", 0),
)  # fmt: skip


class Rounds:
    """Views of a run with a ``summary`` and ``records``."""

    summary: Mapping[str, Any]
    records: Sequence[RoundRecord]

    def frame(self) -> "DataFrame":
        """Return a data frame with a row for each round and the columns of docs/trackers.md."""
        import pandas

        rows = [{"round": record["round"], **round_figures(record)} for record in self.records]
        columns = list(dict.fromkeys(["round", *(name for row in rows for name in row)]))
        return pandas.DataFrame(rows, columns=columns).set_index("round")

    def clients_frame(self) -> "DataFrame":
        """Return a data frame with a row for each round and client: its loss, and the score of its own model."""
        import pandas

        metric, rows = self.summary["metric"]["name"], []
        for record in self.records:
            each = record.get("clients", {}).get("each", [])
            losses = {int(client): loss for client, loss in record.get("loss", {}).items()}
            for client in sorted({*range(len(each)), *losses}):
                score = each[client] if client < len(each) else None
                rows.append({"round": record["round"], "client": client, "loss": losses.get(client), metric: score})
        return pandas.DataFrame(rows, columns=["round", "client", "loss", metric])

    def _repr_html_(self) -> str:
        summary, metric = self.summary, self.summary["metric"]["name"]
        rows = [{"round": r["round"], **round_figures(r)} for r in self.records]
        columns = (*COLUMNS, Column(f"global/{metric}", f"global {metric}", 4))
        columns = tuple(column for column in columns if any(column.key in row for row in rows))
        title = f"{summary['title'] or summary['method']}, {summary['rounds']} rounds, seed {summary['seed']}"
        privacy = Privacy.describe(summary["privacy"]) if "privacy" in summary else ()
        notes = [f"{name}: {value}" for name, value in privacy]
        notes += [] if is_complete(summary) else [f"clients' own figures are over {describe_scored_clients(summary)}"]
        notes += [f"{who} {when}" for who, when in fault_lines(summary)]
        notes += ["stopped before its end"] if summary.get("interrupted") else []
        return to_html(Table("rounds", title, columns, rows[-LATEST:]), below=notes)
