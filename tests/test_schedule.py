"""How tests are distributed over workers, and what the times of a run are summed to."""

import json

import pytest
from scripts.test_times import folder, read, sums

from tests.fixtures.schedule import FilesAndGroups, function, order, unit


class Item:
    """As much of a pytest item as the schedule looks at."""

    def __init__(self, nodeid: str, group: str | None = None):
        self.nodeid, self.group = nodeid, group

    def get_closest_marker(self, name):
        return pytest.mark.xdist_group(self.group).mark if self.group and name == "xdist_group" else None


def test_the_longest_file_or_group_comes_first_and_stays_in_order():
    names = [
        ("a.py::x", None),
        ("b.py::x[1]", None),
        ("c.py::x", "g"),
        ("b.py::x[2]", None),
        ("b.py::y", None),
        ("d.py::x", "g"),
    ]
    items = [Item(*name) for name in names]
    order(items, {"b.py::x": 2.0, "c.py::x": 3.0, "d.py::x": 2.5})
    assert [item.nodeid for item in items] == ["c.py::x", "d.py::x", "b.py::x[1]", "b.py::x[2]", "b.py::y", "a.py::x"]
    assert unit(items[0]) == "g" and unit(items[2]) == "b.py"


def test_a_worker_gets_whole_files_and_groups():
    def scope(nodeid):
        return FilesAndGroups._split_scope(object.__new__(FilesAndGroups), nodeid)

    assert scope("tests/a.py::x[1@2]") == "tests/a.py"
    assert scope("tests/a.py::x[1]@flower") == "flower"


def test_times_are_summed_over_phases_parameters_and_folders(tmp_path):
    rows = [("tests/flower/a.py::x[1]@flower", 1.0), ("tests/flower/a.py::x[1]@flower", 0.5), ("tests/b.py::y", 4.0)]
    lines = [json.dumps({"test": name, "seconds": s, "processor_seconds": s / 2}) for name, s in rows]
    (tmp_path / "times.jsonl").write_text("\n".join(lines))
    times = read(tmp_path / "times.jsonl")
    assert sums(times, function) == [("tests/b.py::y", 4.0, 2.0, 1), ("tests/flower/a.py::x", 1.5, 0.75, 1)]
    assert [folder(test) for test in times] == ["tests/flower", "tests/b.py"]
