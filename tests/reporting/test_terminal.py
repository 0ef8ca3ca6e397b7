"""What is printed: no colour where it is not wanted, no figure cut off on a narrow terminal, lines left whole in a pipe."""

import io
import re

from rich.table import Table

from fedlora.reporting import console
from fedlora.reporting import terminal as tables
from fedlora.reporting.console import Plain
from tests.fixtures.terminal import on_pty

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|38;|48;|9[0-7])[0-9;]*m")


ROWS = """
import fcntl, struct, sys, termios
from fedlora.reporting import terminal as tables
row = lambda name: {"method": name, "metric": {"name": "accuracy", "higher": True}, "seeds": [0], "diverged": 0,
    **{key: {"mean": 0.1234, "std": 0.0} for key in ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")}}
for width in map(int, sys.argv[1:]):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    tables.comparison([row("fedit"), row("fedsa-lora")])
    print("====", flush=True)
"""


def test_a_terminal_of_any_width_shows_every_figure():
    widths = (30, 40, 80, 200)
    text, code = on_pty(["-c", ROWS, *map(str, widths)])
    assert code == 0
    *shown, rest = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "").split("====\n")
    assert len(shown) == len(widths) and not rest
    for width, plain in zip(widths, shown):
        assert max(map(len, plain.split("\n"))) <= width
        assert plain.count("0.123") >= 2 * 3 and "0.1234" in plain and "fedsa-lora" in plain and "…" not in plain, width
        assert all(name in " ".join(plain.split()) for name in ("global", "worst client", "MB up", "aggregation error"))


def test_no_color_means_none():
    code = (
        "from rich.table import Table; from fedlora.reporting.console import printed\n"
        "t = Table(title='T'); t.add_column('a', style='red'); t.add_row('x'); printed(t)"
    )
    assert COLOUR.search(on_pty(["-c", code])[0]), "else this shows nothing"
    found, _ = on_pty(["-c", code], NO_COLOR="1")
    assert not COLOUR.search(found) and "x" in found


def test_a_pipe_gets_whole_lines(capsys):
    table = Table(title="Wide")
    for number in range(8):
        table.add_column(f"column {number}")
    table.add_row(*("v" * 15 for _ in range(8)))
    console.printed(table)
    out = capsys.readouterr().out
    assert "\x1b" not in out and next(line for line in out.splitlines() if "vvv" in line).count("v" * 15) == 8


def test_a_table_without_headings_becomes_lines_of_a_name_and_a_figure():
    sheet, file = Table(title="Of a run", show_header=False), io.StringIO()
    sheet.add_column("what")
    sheet.add_column("figure")
    sheet.add_row("clients'-own-accuracy-mean", "0.1234")
    Plain(file=file, width=24).print(sheet)
    assert file.getvalue().split() == ["Of", "a", "run", "clients'-own-accuracy-me", "an:", "0.1234"]


def test_hostile_cells_stay_text_in_a_list():
    sheet, file = Table(title="[red]T[/red]\x1b[2J"), io.StringIO()
    sheet.add_column("name")
    sheet.add_column("v" * 40)
    sheet.add_row("[blink]a\x1b]0;x\x07[/blink]", "1")
    Plain(file=file, width=30, force_terminal=True, no_color=True).print(sheet)
    out = file.getvalue()
    assert "[blink]a" in out and "\x07" not in out and "\x1b[2J" not in out and "\\x1b" in out


def test_tables_are_printed_by_one_console():
    assert tables.stdout is console.stdout and tables.Plain is Plain
