"""What is printed: no colour where it is not wanted, no figure cut off on a narrow terminal, lines left whole in a pipe."""

import io
import re

from fedlora.reporting.terminal import PlainConsole, show
from fedlora.runs.table import Column, Table, from_pairs
from tests.fixtures.terminal import on_pty

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|38;|48;|9[0-7])[0-9;]*m")


ROWS = """
import fcntl, struct, sys, termios
from fedlora.reporting.tables.comparison import tabulate_comparison
from fedlora.reporting.terminal import show
row = lambda name: {"method": name, "metric": {"name": "accuracy", "higher": True}, "seeds": [0], "diverged": 0,
    **{key: {"mean": 0.1234, "std": 0.0} for key in ("global", "clients", "worst", "mb_up", "mb_down", "error", "seconds")}}
for width in map(int, sys.argv[1:]):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    show(*tabulate_comparison([row("fedit"), row("fedsa-lora")]))
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
        "from fedlora.reporting.terminal import show; from fedlora.runs.table import Column, Table\n"
        "show(Table('t', 'T', (Column('a', 'a'),), [{'a': 'x'}]), '1 figure in a line')"
    )
    assert COLOUR.search(on_pty(["-c", code])[0]), "else this shows nothing"
    found, _ = on_pty(["-c", code], NO_COLOR="1")
    assert not COLOUR.search(found) and "x" in found


def test_a_pipe_gets_whole_lines(capsys):
    columns = tuple(Column(f"c{number}", f"column {number}") for number in range(8))
    show(Table("wide", "Wide", columns, [{column.key: "v" * 15 for column in columns}]), "word " * 60)
    out = capsys.readouterr().out
    assert "\x1b" not in out and next(line for line in out.splitlines() if "vvv" in line).count("v" * 15) == 8
    assert out.splitlines()[-1].split() == ["word"] * 60


def test_lines_that_can_be_copied_are_never_broken():
    code = "from fedlora.reporting.terminal import show; show('short', whole=('fedlora ' + 'x' * 150,))"
    found, _ = on_pty(["-c", code])
    assert "x" * 150 in found


def test_a_table_without_headings_becomes_lines_of_a_name_and_a_figure():
    file = io.StringIO()
    PlainConsole(file=file, width=24).print(from_pairs("Of a run", [("clients'-own-accuracy-mean", "0.1234")]))
    assert file.getvalue().split() == ["Of", "a", "run", "clients'-own-accuracy-me", "an:", "0.1234"]


def test_a_rule_parts_the_rows():
    file = io.StringIO()
    rows = [{"a": "mean"}, {"a": "0"}]
    PlainConsole(file=file, width=30).print(Table("t", "T", (Column("a", "a"),), rows, rules=frozenset({1})))
    assert [line[0] for line in file.getvalue().splitlines()[4:]] == ["│", "├", "│", "└"]


def test_hostile_cells_stay_text_in_a_list_and_in_a_table():
    columns = (Column("name", "name"), Column("v", "v" * 40))
    rows = [{"name": "[blink]a\x1b]0;x\x07[/blink]", "v": "1"}]
    for width in (30, 120):
        file = io.StringIO()
        console = PlainConsole(file=file, width=width, force_terminal=True, no_color=True)
        console.print(Table("t", "[red]T[/red]\x1b[2J", columns, rows))
        out = file.getvalue()
        assert "[blink]a" in out and "\x07" not in out and "\x1b[2J" not in out and "\\x1b" in out
