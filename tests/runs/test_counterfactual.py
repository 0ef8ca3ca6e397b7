"""One run's uploads under every method, against dense algebra; and the run itself is untouched."""

import pytest
import torch

import fedlora
from fedlora import methods as catalog
from fedlora.adapters import LoRA
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedrot_lora import FedRotLoRA
from fedlora.methods.flora import FLoRA
from fedlora.methods.svd import BestRank
from fedlora.rounds import Received
from fedlora.runs.compare import compare_aggregation
from fedlora.runs.counterfactual import compare_uploads
from fedlora.types import Turn
from tests.fixtures.cohort import Cohort
from tests.fixtures.federation import REFERENCE, TABLE, config, same


def figures(c, methods, r=3):
    uploads = [
        Received(Turn(1, k, r), n, {"w": {"A": A, "B": B}}) for k, (n, A, B) in enumerate(zip(c.examples, c.A, c.B))
    ]
    return compare_uploads({"w": FedIT(LoRA(r, 5.0))}, {"w": c.start}, uploads, methods)


@pytest.mark.parametrize("seed", range(5))
def test_errors_tail_and_angles(seed):
    c, lora = Cohort.drawn(seed), LoRA(3, 5.0)
    methods = {"fedit": FedIT(lora), "fedrot": FedRotLoRA(lora), "svd": BestRank(lora), "flora": FLoRA(lora)}
    found = figures(c, methods)
    size = float(c.exact.norm())
    assert found["methods"]["fedit"]["error"] == pytest.approx(c.error(FedIT(lora)) / size, rel=1e-6)
    assert found["methods"]["svd"]["error"] == pytest.approx(c.best / size, rel=1e-5)
    assert found["methods"]["flora"]["error"] < 1e-6
    assert found["methods"]["fedit"]["gauge"] == pytest.approx(0, abs=1e-12)
    assert found["tail"] == pytest.approx((c.best / size) ** 2)
    turned = []
    for k, (A, B) in enumerate(zip(c.A, c.B)):
        M = A @ c.start["A"].T
        P, _, Qt = torch.linalg.svd(M)
        D = torch.diag(torch.tensor([1.0, 1.0, float(torch.det(P @ Qt).sign())]).double())
        P2, _, Q2 = torch.linalg.svd(0.5 * torch.eye(3).double() + 0.5 * P @ D @ Qt)
        turned.append((c.w[k], (P2 @ Q2).T @ A, B @ (P2 @ Q2)))
    A, B = (sum(t[0] * t[i] for t in turned) for i in (1, 2))
    assert found["methods"]["fedrot"]["error"] == pytest.approx(float((B @ A - c.exact).norm()) / size, rel=1e-6)
    Q = [torch.linalg.qr(A.T).Q for A in c.A]
    angles = [torch.linalg.svdvals(Q[i].T @ Q[j]).clamp(max=1).acos() for i in range(4) for j in range(i)]
    assert found["angles"]["A"] == pytest.approx(float(torch.rad2deg(torch.cat(angles).mean())))


def test_the_run_is_the_run(reference):
    seen = []
    watched = fedlora.run(config(*REFERENCE), observe=lambda *round: seen.append(round) or {})
    assert len(seen) == 4 and same(reference("fedit").shared, watched.shared)


def test_from_a_table(tmp_path):
    rows, uploads = compare_aggregation(TABLE, None, tmp_path / "o")
    errors = {row["method"]: row["error"] for row in rows}
    assert set(errors) == set(catalog.merging_methods())
    least = min(v for k, v in errors.items() if k not in ("flora", "fedex-lora"))
    assert errors["svd"] == pytest.approx(least, rel=1e-6)  # flexlora's is the same product
    assert errors["flora-na"] <= errors["fedit"]
    assert 0 < uploads["angle A"] < 90 and 0 <= uploads["tail"] < 1
    assert (tmp_path / "o" / "oracle.json").exists() and (tmp_path / "o" / "shared.safetensors").exists()


def test_unequal_ranks_leave_out_who_needs_one_rank():
    rows, _ = compare_aggregation({**TABLE, "clients": {"count": 3, "ranks": [1, 2]}, "method": {"name": "flora"}})
    assert {row["method"] for row in rows} == {"flora", "flexlora", "hetlora", "svd"}


def test_mistakes():
    with pytest.raises(ValueError, match="needs uploads of both A and B"):
        compare_aggregation({**TABLE, "method": {"name": "ffa-lora"}})
    with pytest.raises(ValueError, match="set adapter.name to 'lora'"):
        compare_aggregation({**TABLE, "adapter": {"name": "vera", "rank": 8}})
    with pytest.raises(ValueError, match="cannot be applied to finished adapters"):
        compare_aggregation(TABLE, ["ravan"])


def test_the_oracle_takes_the_runs_weights():
    rows, _ = compare_aggregation({**TABLE, "method": {"name": "fedit", "weighting": "uniform"}}, ["flora", "svd"])
    assert rows[0]["error"] < 1e-6
