"""Processes that train one client together: equal trees, means, files, and an error of one that ends all."""

import pytest
import torch

from fedlora.training import ranks
from tests.fixtures.rank_pair import read_results, start_pair

pytestmark = pytest.mark.xdist_group("parallel")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return read_results(start_pair("ranks", tmp_path_factory.mktemp("ranks")))


def values(results, name):
    return [result[name] for result in results]


def test_one_process_is_left_alone(tmp_path):
    tree = {"a": {"A": torch.ones(2)}}
    assert not ranks.is_parallel() and ranks.is_first_rank()
    assert ranks.synchronize(tree) is tree and ranks.average_tree(tree) is tree
    assert ranks.average(None) is None and ranks.average(0.5) == 0.5
    ranks.barrier()
    ranks.check_equal("x", object())
    ranks.check_trained_together(tree, tree)
    ranks.end_run(is_interrupted=True)
    with ranks.copy_from_first_rank(tmp_path) as folder:
        assert folder is tmp_path
    error = OSError("full")
    with pytest.raises(OSError, match="full") as caught, ranks.share_failure():
        raise error
    assert caught.value is error and error.__cause__ is None


def test_two_processes_know_each_other(results):
    assert values(results, "facts") == [(True, True), (True, False)]


def test_leaves_are_those_of_the_first_rank_in_place(results):
    for result in results:
        tree, is_same = result["synchronized"]
        assert is_same, "the tree and its tensors are the caller's"
        assert torch.equal(tree["b"]["A"], torch.arange(6.0).reshape(3, 2).mT)
        assert torch.equal(tree["a"]["B"], torch.full((2,), 1.5, dtype=torch.bfloat16))
        assert tree["a"]["B"].dtype == torch.bfloat16 and torch.equal(tree["a"]["A"], torch.zeros(3))


def test_means(results):
    assert values(results, "averages") == 2 * [[2.0, 3.0, None]]
    for result in results:
        mean, start = result["tree"]
        assert torch.equal(mean["a"]["A"], torch.tensor([0.5, 0.5])) and torch.equal(
            mean["a"]["B"], torch.tensor([2.0])
        )
        assert start != 0.5, "the tree that was given is unchanged"


def test_a_barrier_waits_for_the_last(results):
    assert results[0]["waited"] >= 0.2 > results[1]["waited"]


def test_a_value_that_differs_is_an_error_of_both(results):
    assert values(results, "equal") == 2 * [None]
    sentence = "ValueError: the seed is not the same on ranks 0 and 1; make the same call with it on every rank."
    assert values(results, "unequal") == 2 * [sentence]


def test_training_apart_is_an_error_of_both_and_rounding_is_none(results):
    assert values(results, "rounding") == 2 * [None] and values(results, "nothing trained") == 2 * [None]
    for sentence in values(results, "apart"):
        assert sentence.startswith("ValueError: 2 processes have trained this client, each by itself")


def test_files_of_the_first_rank(results):
    first, second = values(results, "files")
    assert first == {"own": True, "found": None, "is gone": False}
    content = {"config.toml": b"rounds = 2", "rounds/0/tree": bytes(range(256)), "rounds/empty": b""}
    assert second == {"own": False, "found": content, "is gone": True}
    assert results[1]["all files"] == {**content, "other.txt": b"x"}, "without names: of all"
    assert results[1]["no files"] == {}


def test_an_error_of_one_ends_the_other_with_its_sentence(results):
    assert results[1]["failure"] == "ZeroDivisionError: division by zero"
    assert results[0]["failure"] == "RankError: rank 1 has ended: ZeroDivisionError: division by zero"


def test_an_error_that_follows_from_another_is_told_as_that(results):
    assert results[1]["consequence"] == "OSError: the disk is full"
    assert results[0]["consequence"] == "RankError: rank 1 has ended: OSError: the disk is full"
    assert results[0]["cause"] == "ConnectionError: closed by peer"


def test_an_interrupted_rank_ends_the_other(results):
    assert results[1]["interrupt"] is None
    assert results[0]["interrupt"] == "RankError: rank 1 was interrupted"


def test_a_second_process_group_begins_anew(results):
    assert values(results, "second group") == 2 * [[2.0, 1]]
