"""A run on all ranks: the first one writes and reports, the others compute the same."""

import pytest

from fedlora.runs.all_ranks import run_on_all_ranks
from fedlora.runs.folder import RunFolder
from fedlora.runs.run import run_config
from tests.fixtures import rank_pair as cases
from tests.fixtures.federation import config, same

pytestmark = pytest.mark.xdist_group("parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.start_pair("runs", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(folder):
    return cases.read_results(folder)


@pytest.fixture(scope="module")
def alone():
    return run_config(config(*cases.SETTINGS))


def test_one_process_is_a_plain_run(tmp_path, alone):
    result = run_on_all_ranks(config(*cases.SETTINGS), tmp_path / "run", lambda event: None, (), False)
    assert same(result.shared, alone.shared) and result.folder == tmp_path / "run"


def test_both_ranks_end_at_the_tree_of_one(results, alone):
    assert all(same(result["shared"], alone.shared) for result in results)


def test_only_the_first_rank_writes_and_reports(folder, results):
    assert [result["folder"] for result in results] == [str(folder / "run"), None]
    assert [result["rounds reported"] for result in results] == [[1, 2], []]
    assert results[0]["events"] > 0 and results[1]["events"] == 0
    assert [record["round"] for record in RunFolder(folder / "run").records] == [1, 2]


def test_both_go_on_from_the_folder_of_the_first(results):
    assert [result["resumed"] for result in results] == [[1, 2], [1, 2]]
    assert all(same(result["resumed shared"], result["shared"]) for result in results)


def test_without_a_folder(results):
    assert all(result["no folder"] is None for result in results)


def test_two_configurations_are_refused_on_both(results):
    sentence = (
        "ValueError: the configuration is not the same on ranks 0 and 1; make the same call with it on every rank."
    )
    errors = [result["two seeds"] for result in results]
    assert (
        all(error.endswith(sentence) for error in errors) and sentence in errors
    )  # the slower one may quote the other


def test_an_interrupt_of_one_ends_the_other(results):
    assert results[0]["interrupted"] is True
    assert results[1]["interrupted"] == "RankError: rank 0 was interrupted"
