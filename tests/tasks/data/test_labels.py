"""Which value is which class: by name wherever there is one, and the same for every party or refused."""

import json
from itertools import permutations

import datasets
import pytest
from PIL import Image

import fedlora
from fedlora.schema import dumps
from fedlora.tasks.data.labels import Classes, is_number, label_map
from fedlora.tasks.data.rows import client_groups
from fedlora.tasks.data.templates import fill_rows, label_strata
from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.seq2seq import read_pairs as asked_and_answered
from fedlora.tasks.text_classification import TextClassification
from tests.fixtures.federation import TABLE, TINY_VIT, config

WORDS, NUMBERS, CODES = ("urgent", "soon", "routine"), ("1", "2", "3"), ("01", "2", "30")


def rows(values, feature=None):
    """A split with these labels and a picture of four pixels in each row."""
    found = datasets.Dataset.from_dict({"image": [bytes(4)] * len(values), "label": list(values)})
    return found if feature is None else found.cast_column("label", feature)


def in_order(names, order):
    """The labels ``names`` as a ClassLabel whose names stand in this order."""
    return rows([order.index(name) for name in names], datasets.ClassLabel(names=list(order)))


def saved(folder, train, test=None):
    folder.mkdir(parents=True)
    for name, split in (("train", train), ("test", train if test is None else test)):
        split.to_parquet(folder / f"{name}.parquet")
    (folder / "meta.json").write_text(json.dumps({"image_shape": [2, 2, 1]}))
    return str(folder)


def pictures(folder, labels):
    """An image folder."""
    for split in ("train", "test"):
        for label in labels:
            (folder / split / label).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (4, 4), 40 * i).save(folder / split / label / f"{i}.png")
    return str(folder)


def read(split, given, keep=None):
    """The class of each row, by its name."""
    classes = Classes.of([split], "label", given, keep)
    found = classes.targets(split, split, "label")
    return [found.names[i] for i in found.train.tolist()], found


PARTIES = {  # what somebody's file holds for the rows that are called so
    "strings": lambda names: rows(names),
    "integers": lambda names: rows([int(name) for name in names]),
    "floats": lambda names: rows([float(name) for name in names]),
    **{f"ClassLabel{k}": (lambda names, k=k: in_order(names, list(permutations(sorted(set(names))))[k])) for k in range(6)},
}  # fmt: skip


@pytest.mark.parametrize("labels", [WORDS, NUMBERS, CODES, ("1", "2", "other")], ids=" ".join)
@pytest.mark.parametrize("kind", PARTIES)
def test_every_party_has_the_same_classes_or_is_refused(kind, labels):
    numeric = kind in ("integers", "floats")
    held = [name for name in labels if name.isdigit()] if numeric else list(labels)
    if not held:
        return  # words are no numbers
    if kind.startswith("ClassLabel") and len(labels) != 3:
        return
    for given in permutations(labels):
        found, _ = read(PARTIES[kind](held * 2), given)
        assert found == held * 2, given
        some, _ = read(PARTIES[kind](held * 2).select([0, len(held)]), given)
        assert some == held[:1] * 2, "a party that lacks labels"


@pytest.mark.parametrize(
    "split, given, said",
    [
        (rows([1, 2, 3, 4]), ("1", "2", "3"), "holds 4 in the training rows, which matches no label; the labels are 1, 2, 3;"),
        (rows([0, 1, 2]), NUMBERS, "holds 0 in the training rows, which matches no label; the labels are 1, 2, 3;"),
        (rows([1, 2, 3]), WORDS, "holds 3 in .*; no label name is a number, so that numbers are positions, 0 = urgent, 1 = soon, 2 = routine"),
        (rows([0, 1]), ("1", "other", "none"), "holds 0 in"),
        (rows([0.5, 1.0]), WORDS, "holds 0.5 in"),
        (rows(["Urgent", "soon"]), WORDS, "holds 'Urgent' in .*; did you mean 'urgent'"),
        (rows(["0", "1", "2"]), WORDS, "holds 0, 1, 2 in the training rows, which match no label; the labels are 'urgent', 'soon', 'routine'"),
        (in_order(["dog", "eel"], ["dog", "eel"]), ("cat", "dog"), "holds 'eel' in"),
        (in_order(["low", "high"], ["low", "high"]), ("hoch", "tief"), "holds 'low', 'high' in"),
        (in_order(["1", "2"], ["1", "2"]), WORDS, "holds 1, 2 in"),
        (rows([True, False]), WORDS, "holds True, False in"),
        (rows([1, 2]), ("1", "01"), "the label 1 is '1' as well as '01' in task.label_names"),
        (rows([0, -1], datasets.ClassLabel(names=["a", "b"])), ("a", "b"), "holds -1 in"),
    ],
)  # fmt: skip
def test_what_has_no_name_is_refused(split, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        read(split, given)
    assert "\n" not in str(caught.value)


def test_numbers_are_positions_only_where_no_name_is_one_and_that_is_said():
    found, targets = read(rows([2, 0, 1, 2]), WORDS)
    assert found == ["routine", "urgent", "soon", "routine"] and targets.reading == "position"
    assert targets.notes[0] == (
        "the labels of column 'label' in the training rows are numbers, and none of the label names is one: they are "
        "read as positions, 0 = urgent, 1 = soon, 2 = routine."
    )
    assert label_map(WORDS, WORDS, "position") == {"0": "urgent", "1": "soon", "2": "routine"}
    plain = rows([1, 0], datasets.ClassLabel(names=["0", "1"]))  # names that say no more than the numbers
    assert read(plain, ("no", "yes"))[0] == ["yes", "no"] and read(plain, ("no", "yes"))[1].reading == "position"
    assert read(plain, ("1", "0"))[0] == ["1", "0"]
    assert read(rows([True, False]), ("true", "false"))[0] == ["true", "false"]
    assert read(rows([1, 0]), ("1", "0"))[1].reading == "name" and not read(rows([1, 0]), ("1", "0"))[1].notes


@pytest.mark.parametrize(
    "values, names",
    [
        ([4019, 25000], ("4019", "25000")),
        ([2022, 2020, 2021], ("2020", "2021", "2022")),
        ([5, 1, 2, 3, 4], ("1", "2", "3", "4", "5")),
        ([10_000_007, 99_999_989], ("10000007", "99999989")),
        ([-1, 0, 1], ("-1", "0", "1")),
        ([0, 1, 3], ("0", "1", "3")),
        ([10.0, 9.0, 2.5], ("2.5", "9", "10")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["b", "c", "a"], ("a", "b", "c")),
        ([True, False], ("False", "True")),
    ],
)
def test_the_distinct_values_are_the_classes(values, names):
    found, targets = read(rows(values * 2), None)
    assert targets.names == names and len(set(targets.train.tolist())) == len(names)
    assert [names.index(name) for name in found] == targets.train.tolist()
    numbers = is_number(names[0])
    assert (
        [note.startswith("the labels of column 'label' are numbers: ") for note in targets.notes] == [True]
    ) == numbers


def test_the_classes_are_those_of_all_rows_and_not_of_the_rows_that_are_drawn(tmp_path):
    data = saved(tmp_path / "a", rows([4, 19, 250] * 20))
    for seed in range(3):
        found = ImageClassification(data, train_rows=2, test_rows=1).load(str(TINY_VIT), seed)
        assert found.label_names == ("4", "19", "250")
    strange = saved(tmp_path / "b", rows(["cat", "dog"] * 3), rows(["cat", "dgo"]))
    with pytest.raises(
        ValueError,
        match="holds 'dgo' in the test rows, which matches no label; did you mean 'dog'.*set task.label_names",
    ):
        ImageClassification(strange).load(str(TINY_VIT), 0)
    rare = tmp_path / "rare"
    rare.mkdir()
    rows([*range(10, 40)]).to_parquet(rare / "train.parquet")  # a label a row: chance decides which are tested on
    (rare / "meta.json").write_text(json.dumps({"image_shape": [2, 2, 1]}))
    assert len(ImageClassification(str(rare)).load(str(TINY_VIT), 0).label_names) == 30


def test_training_and_test_rows_of_unequal_kinds_agree(tmp_path):
    order = ["dog", "cat"]
    train, want = in_order(["cat", "dog", "dog"], order), {"strings": ["dog", "cat"], "other order": ["dog", "cat"]}
    for kind, test in {
        "strings": rows(["dog", "cat"]),
        "other order": in_order(["dog", "cat"], ["cat", "dog"]),
    }.items():
        found = ImageClassification(saved(tmp_path / kind, train, test)).load(str(TINY_VIT), 0)
        assert [found.label_names[i] for i in found.test.labels.tolist()] == want[kind]
    numbers = ImageClassification(saved(tmp_path / "n", rows(["cat", "dog"]), rows([0, 1])))
    with pytest.raises(
        ValueError, match="holds 0, 1 in the test rows, which match no label; the training rows have 'cat', 'dog'"
    ):
        numbers.load(str(TINY_VIT), 0)


def test_image_folders_are_matched_by_their_names(tmp_path):
    data = pictures(tmp_path, ("cancer", "healthy"))
    for given in (["healthy", "cancer"], ["cancer", "healthy"], ["benign", "healthy", "cancer"]):
        found = ImageClassification(data, label_names=given).load(str(TINY_VIT), 0)
        assert found.label_names == tuple(given) and found.reading == "name"
        assert [given[i] for i in found.train.labels.tolist()] == ["cancer"] * 2 + ["healthy"] * 2
    with pytest.raises(
        ValueError,
        match="holds 'cancer', 'healthy' in the training rows, which match no label; the labels are 'a', 'b'",
    ):
        ImageClassification(data, label_names=["a", "b"]).load(str(TINY_VIT), 0)


def test_kept_labels_are_named_as_in_the_rows_or_by_name_and_do_not_depend_on_the_rows(tmp_path):
    for split, keep in (
        (in_order(["ant", "bee", "cat"], ["bee", "cat", "ant"]), ["cat", "bee"]), (rows([5, 7, 9]), [9, 7]),
        (rows([5, 7, 9]), ["9", "7"]),
    ):  # fmt: skip
        found = Classes.of([split], "label", None, keep)
        values = found.values(split, "label")
        kept = split.select([i for i, value in enumerate(split["label"]) if value in values])
        targets = found.targets(kept, kept, "label")
        assert (
            len(kept) == 2 and sorted(targets.names) == sorted(map(str, keep)) and set(targets.train.tolist()) == {0, 1}
        )
    task = ImageClassification("x", label_names=["a", "b", "c", "d"], labels=["d", "b", "c"])
    assert task.known_labels() == ("b", "c", "d")
    some = ImageClassification(
        saved(tmp_path / "p", rows(["a", "c", "d", "d"])), label_names=task.label_names, labels=task.labels
    )
    found = some.load(str(TINY_VIT), 0)
    assert found.label_names == task.known_labels() and found.train.labels.tolist() == [1, 2, 2]
    assert label_map(task.all_labels(), task.known_labels(), "position") == {"1": "b", "2": "c", "3": "d"}
    with pytest.raises(ValueError, match="task.labels has 'e', which is no label; labels are 'a', 'b'"):
        ImageClassification("x", label_names=["a", "b"], labels=["a", "e"])


@pytest.mark.parametrize("given, said", [(["a", "b", "a"], "has 'a' twice"), (["a"], "has only 1 label")])
def test_names_are_two_or_more_and_each_is_one(given, said):
    with pytest.raises(ValueError, match=f"task.label_names {said}"):
        TextClassification("x", label_names=given)


@pytest.mark.parametrize("values", [[0.0, 1.0, float("nan")], [0, 1, None]], ids=["NaN", "nothing"])
def test_a_label_that_is_missing_is_said(values):
    with pytest.raises(ValueError, match="has 1 missing values in"):
        read(rows(values), None)


@pytest.fixture
def texts(tmp_path, shared):
    """Loads lines of text and label."""

    def load(lines, kind=TextClassification, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in ("train", "test"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return kind(str(folder), **settings).load(str(shared / "models" / "minilm-l3-h384-v8k"), 0)

    return load


@pytest.mark.shared
def test_texts_and_pairs(texts):
    names = ["1", "2", "3", "4", "5"]
    for columns in ({"text": "a word"}, {"sentence1": "a", "sentence2": "word"}):
        numbers = texts([{**columns, "label": i} for i in (1, 2, 3, 4)], label_names=names)
        words = texts([{**columns, "label": name} for name in names], label_names=names)
        assert numbers.train.labels.tolist() == [0, 1, 2, 3] and words.train.labels.tolist() == [0, 1, 2, 3, 4]
        assert numbers.label_names == words.label_names == tuple(names)


@pytest.mark.shared
def test_texts_that_are_cut_are_said(texts):
    lines = [{"text": "word " * n, "label": n % 2} for n in (1, 4, 5, 20)]  # [CLS] and [SEP] are two tokens more
    assert texts(lines, max_length=7).notes == (
        "1 of 4 training rows were cut to 7 tokens on the right.", "1 of 4 test rows were cut to 7 tokens on the right.",
    )  # fmt: skip
    assert texts(lines, max_length=22).notes == ()
    pairs = [{"sentence1": "word " * 3, "sentence2": "word " * n, "label": n % 2} for n in (1, 2, 9)]
    assert texts(pairs, max_length=8).notes[0] == "1 of 3 training rows were cut to 8 tokens on the right."


def test_targets_of_sequence_to_sequence():
    """A target is the text of its class, whatever the file holds."""
    for split in (
        rows(["cat", "dog"]),
        in_order(["cat", "dog"], ["dog", "cat"]),
        in_order(["cat", "dog"], ["cat", "dog"]),
    ):
        split = split.rename_columns({"label": "target"}).add_column("source", ["meow", "woof"])
        for given in (None, ["dog", "cat"], ["eel", "cat", "dog"]):
            assert asked_and_answered(split, None, None, given)[1:] == ([["cat"], ["dog"]], [])
    numbers = rows([1, 0]).rename_columns({"label": "target"}).add_column("source", ["meow", "woof"])
    _, golds, notes = asked_and_answered(numbers, None, None, ["dog", "cat"])
    assert golds == [["cat"], ["dog"]] and "read as positions, 0 = dog, 1 = cat" in notes[0]
    assert asked_and_answered(numbers, None, None, ["1", "0"])[1:] == ([["1"], ["0"]], [])
    with pytest.raises(ValueError, match=r"\(task.target\) holds 'dog' in the training rows, which matches no label"):
        asked_and_answered(split, None, None, ["cat", "eel"])


def test_a_classlabel_in_a_template_or_a_column_of_clients_is_its_name():
    split = in_order(["cat", "dog"], ["dog", "cat"])
    assert fill_rows("a {label}", split, "task.prompt") == ["a cat", "a dog"]
    assert [kinds.tolist() for kinds in label_strata(split, in_order(["cat"], ["cat", "dog"]), "label")] == [
        [0, 1],
        [0],
    ]
    assert client_groups(split, "label", "training") == ("cat", "dog")


def small(data, **task):
    """A run of one step on these pictures."""
    table = {**TABLE, "rounds": 1, "clients": {"count": 2}, "training": {"local_steps": 1, "batch_size": 2}}
    return {**table, "task": {"name": "image-classification", "data": data, **task}}


def test_the_python_api_has_a_head_for_the_values_that_there_are(tmp_path):
    said = []
    result = fedlora.run(
        config(table=small(saved(tmp_path / "d", rows([4019, 25000] * 6)))), tmp_path / "run", said.append
    )
    assert result.shared["classifier"]["weight"].shape[0] == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels"] == ["4019", "25000"]
    assert summary["label_maps"] == [{"clients": "all", "by": "name", "classes": {"4019": "4019", "25000": "25000"}}]
    notes = [event.text for event in said if event.kind == "note"]
    assert notes == summary["notes"] and notes[0].startswith("the labels of column 'label' are numbers: 4019, 25000;")


@pytest.mark.parametrize("values", [[4019, 25000], [0, 1], ["cat", "dog"], [True, False]], ids=str)
def test_the_best_rounds_folder_says_the_same_of_labels_as_the_runs(values, tmp_path):
    names = ["a", "b"] if values == [0, 1] else None
    table = small(saved(tmp_path / "d", rows(values * 6)), **({"label_names": names} if names else {}))
    fedlora.run(config("checkpoint.best='clients'", table=table), tmp_path / "run")
    whole, best = (json.loads((tmp_path / place / "summary.json").read_text()) for place in ("run", "run/best"))
    assert best["labels"] == whole["labels"] and best["label_maps"] == whole["label_maps"]
    assert sorted(best["label_maps"][0]["classes"].values()) == sorted(whole["labels"])


def test_the_command_matches_by_name_or_refuses_and_leaves_nothing(tmp_path, commands):
    numbers = saved(tmp_path / "n", rows([1, 2, 3, 4] * 4))
    (tmp_path / "my.toml").write_text(dumps(config(table=small(numbers, label_names=["1", "2", "3", "4", "5"])).table))
    found = commands.call(["fedlora", "run", "my.toml", "--out", "run", "--json"], tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["label_maps"][0]["classes"] == {str(i): str(i) for i in range(1, 6)}
    held = json.loads((tmp_path / "run" / "rows.json").read_text())
    assert [sum(counts) for counts in zip(*(own["labels"] for own in held["clients"].values()))] == [4, 4, 4, 4, 0]
    found = commands.call(
        ["fedlora", "run", "my.toml", "--out", "no", "-o", "task.label_names=['a', 'b', 'c', 'd']"], tmp_path
    )
    assert found.returncode == 2 and "holds 4 in the training rows, which matches no label" in found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "no").exists()


def test_rows_that_belong_to_nobody_are_said_in_a_run(tmp_path):
    split = rows(["a", "b"] * 9).add_column("who", ["x", "y", "z"] * 6)
    table = {
        **small(saved(tmp_path / "d", split)),
        "clients": {"count": 2, "partition": {"name": "column", "column": "who"}},
    }
    notes = fedlora.run(config(table=table)).summary["notes"]
    assert "their 6 of 18 training rows and 6 of 18 test rows are unused: 'z' (6); clients.count is 2." in notes[0]
