"""Tables of adapters: combined, exported, and how alike the clients' factors are."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.runs.table import DASH, Column, Table, from_pairs


def aggregation(found: Mapping[str, Any]) -> Table:
    """Finished adapters that were combined: ranks and errors."""
    count = found["adapters"]
    worst = max(found["weights"], key=lambda part: found["weights"][part]["served"])
    return from_pairs(f"{count} adapter{'' if count == 1 else 's'} combined", [
        ("weights", str(len(found["weights"]))),
        ("ranks", ", ".join(map(str, found["ranks"]))),
        ("error against the exact mean", relative(found["error"])),
        ("the same, of the averaged factors", relative(found["error_fedit"])),
        (f"largest error, at {worst}", relative(found["weights"][worst]["served"])),
        ("folder", found["folder"]),
    ])  # fmt: skip


def exports(found: Sequence[Mapping[str, Any]]) -> Table:
    """Exported folders, and their distance from the run's own model."""
    rows = [
        {"folder": row["folder"], "client": "shared" if row["client"] is None else str(row["client"]),
         "ranks": ", ".join(map(str, row["ranks"])), "error": relative(row["error"]),
         "difference": relative(row["difference"])}
        for row in found
    ]  # fmt: skip
    columns = (Column("folder", "folder"), Column("client", "client"), Column("ranks", "ranks"),
               Column("error", "cut off"), Column("difference", "largest difference of logits"))  # fmt: skip
    return Table("exports", "Exported, loaded again and compared", columns, rows)


def similarity(weights: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> list[Table | str]:
    """How alike the clients' factors are, weight by weight."""
    rows: list[dict[str, Any]] = [{"weight": part, **row} for part, row in [*weights.items(), ("mean", mean)]]
    figures = (
        Column(name, f"{name}, degrees", 1) if name.endswith("angle") else Column(name, name, 3) for name in mean
    )
    title = "Likeness of the clients' factors, mean over pairs of clients"
    return [
        Table("similarity", title, (Column("weight", "weight"), *figures), rows),
        "A, B: cosine of the factors as they are. A change: cosine of what training added to the common start.",
    ]


def relative(value: float | None) -> str:
    """A relative error in scientific notation."""
    return DASH if value is None else f"{value:.2e}"
