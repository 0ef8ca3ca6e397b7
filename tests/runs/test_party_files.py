"""The parties' files become one configuration; a wrong one is named."""

import pytest

import fedlora
from fedlora.runs.config import build, read
from fedlora.runs.party_files import read_parties
from fedlora.schema import dumps, merge_tables, read_table, set_keys
from tests.fixtures.hospitals import PARTIES, open_hospitals


@pytest.fixture
def hospitals(tmp_path):
    return open_hospitals(tmp_path)


def test_files_that_are_laid_over_a_main_file_and_whole_files_make_the_same_parties(hospitals, tmp_path):
    main, files = hospitals
    laid = read_parties(files, main)
    whole = [tmp_path / f"{file.parent.name}-whole.toml" for file in files]
    for file, path in zip(files, whole):
        table = merge_tables(read_table(main), read_table(file))
        path.write_text(dumps(set_keys(table, {"task.data": f"{file.parent.name}/notes.csv", "model.name": "encoder"})))
    alone = read_parties(whole)
    assert [party.task for party in laid.party] == [party.task for party in alone.party]
    assert [party.task for party in laid.party] == [
        {**task, "data": str(tmp_path / name / "notes.csv")} for name, task in PARTIES.items()
    ]
    assert [party.file for party in laid.party] == list(map(str, files))
    strip = [{k: v for k, v in c.table.items() if k != "party"} for c in (laid, alone)]
    assert strip[0] == strip[1]
    assert build(laid.table) == laid


def test_a_setting_that_is_not_written_in_a_whole_file_is_not_that_of_the_first(hospitals, tmp_path):
    main, files = hospitals
    tables = [merge_tables(read_table(main), read_table(files[k])) for k in (2, 0)]
    for table in tables:
        table["clients"]["count"] = 2
    config = read_parties(tables)
    assert [party.task.get("encoding") for party in config.party] == ["latin-1", None]
    assert config._of_party(1).task.encoding is None


def test_tables_need_no_clients_section_and_overrides_are_for_all(hospitals):
    main, files = hospitals
    table = {key: value for key, value in read_table(main).items() if key != "clients"}
    config = read_parties(files[:2], table, ["rounds=5", "engine.threads=1", "training.local_steps=3"])
    assert (config.clients.count, config.clients.own_data, config.rounds, config.engine.threads) == (2, True, 5, 1)
    with pytest.raises(fedlora.ConfigError, match=r"task.label is a setting that each party has of its own"):
        read_parties([table, table], overrides=["task.label=x"])


def test_the_parties_file_of_a_local_flower_deployment_is_read(hospitals, tmp_path):
    main, _ = hospitals
    entries = [{"client": 1, "task": {"data": "y.csv", "text": "b"}}, {"client": 0, "task": {"data": "x.csv"}}]
    file = tmp_path / "parties.toml"
    file.write_text(dumps({"party": entries}))
    config = read_parties([file], main, ["clients.count=2"])
    assert [party.task["data"] for party in config.party] == ["x.csv", "y.csv"]
    file.write_text(dumps({"party": [{**entries[0], "client": 3}, entries[1]]}))
    with pytest.raises(fedlora.ConfigError, match=r"are clients \[3, 0\]; each of 0 to 1 is needed"):
        read_parties([file], main, ["clients.count=2"])


WRONG = {
    "task.lable = 'x'": r"{0}: there is no setting 'task.lable'; did you mean 'label'\?",
    "task.data = 3": "{0}: task.data is 3; it should be a valid string",
    "rounds = 7": "rounds is 2 in {1} and 7 in {0}; all parties need one value",
    "training.batch_size = 5": "training.batch_size is 4 in {1} and 5 in {0}",
    "training.precision = 'bf16'": "training.precision is 'auto' in {1} and 'bf16' in {0}",
    "method.name = 'flora'": "method.name is 'fedit' in {1} and 'flora' in {0}",
    "privacy = {level = 'example', noise_multiplier = 1.0, delta = 1e-3}": "privacy.level is not set in {1} and 'example' in {0}",
    "task.label_names = ['a', 'b']": "task.label_names is .* in {1} and .'a', 'b'. in {0}",
    "model.start = 'x'": "model.start is not set in {1} and 'x' in {0}",
    "rounds = ": "'{0}' is not valid TOML",
    "engine.devise = 'cpu'": r"{0}: there is no setting 'engine.devise'",
}  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_setting_is_named_with_its_file(line, hospitals):
    main, files = hospitals
    files[1].write_text(f"{line}\n{''.join(f'task.{k} = {v!r}{chr(10)}' for k, v in PARTIES['b'].items() if 'task.data' not in line)}")  # fmt: skip
    if "task.data" not in line:
        files[1].write_text(files[1].read_text() + "task.data = 'notes.csv'\n")
    with pytest.raises(fedlora.ConfigError, match=WRONG[line].format(files[1], main)):
        read_parties(files, main)


def test_parties_that_do_not_fit_the_main_file_are_refused(hospitals):
    main, files = hospitals
    with pytest.raises(fedlora.ConfigError, match=r"clients.count = 3, but settings of 2 parties are named"):
        read_parties(files[:2], main)
    table = read_table(main)
    with pytest.raises(fedlora.ConfigError, match=r"clients.partition = 'iid', but every party has its own rows"):
        read_parties(files, set_keys(table, {"clients.partition.name": "iid"}))
    with pytest.raises(fedlora.ConfigError, match=r"party 0 has no.* table|party 0: the configuration has no .model."):
        read_parties([{"task": {"data": "x"}}])
    with pytest.raises(fedlora.ConfigError, match="no party is named"):
        read_parties([], main)
    with pytest.raises(fedlora.ConfigError, match=r"has \[\[party\]\] tables of its own"):
        read_parties(files, read_parties(files, main).table)
    files[2].write_text("task.label = 'Klasse'\n")
    with pytest.raises(fedlora.ConfigError, match=rf"{files[2]} names no data, and each party has its own"):
        read_parties(files, main)


def test_what_the_rehearsal_does_not_use_is_said(hospitals):
    main, files = hospitals
    notes = []
    for file in files[:2]:
        file.write_text(file.read_text() + "[engine]\ndevice = 'cuda:7'\n[checkpoint]\nkeep = 9\n")
    files[1].write_text(files[1].read_text().replace("notes.csv", "../a/notes.csv"))
    config = read_parties(files, main, note=notes.append)
    assert config.engine.device == "auto" and config.checkpoint.keep == 3
    own = [
        text
        for file in files[:2]
        for text in (
            f"{file} sets engine.device = 'cuda:7'; a rehearsal runs on one machine, with that of {main}.",
            f"{file} has its own [checkpoint], which only the server reads; that of {main} is used.",
        )
    ]
    assert notes == [*own, f"{files[0]} and {files[1]} name the same data, {config.party[0].task['data']!r}."]


def test_a_file_is_not_taken_from_another_folder(hospitals, tmp_path, monkeypatch):
    """The notes.csv in the folder of the command is not that of the party."""
    main, files = hospitals
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "b" / "notes.csv").unlink()
    assert read_parties(files, main).party[1].task["data"] == str(tmp_path / "b" / "notes.csv")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("clients.partition.name=iid", r"\[\[party\]\] tables give each client its own data, but clients.partition is"),
        ("clients.count=4", r"there are 3 \[\[party\]\] tables, but clients.count is 4"),
        ("checkpoint.best=global", "the server has no test rows; set it to 'clients'"),
        ("party=[{task={data='x', max_length=3}}]", "party 0: there is no setting 'task.max_length'"),
        ("party=[{engine={device='cpu'}}]", r"there is no setting 'party\[0\].engine'"),
        ("party=3", "party is 3; it should be a valid list"),
    ],
)
def test_tables_of_parties_in_a_configuration_are_checked(override, sentence, hospitals, tmp_path):
    main, files = hospitals
    (tmp_path / "run.toml").write_text(dumps(read_parties(files, main).table))
    with pytest.raises(fedlora.ConfigError, match=sentence):
        read(tmp_path / "run.toml", [override])
