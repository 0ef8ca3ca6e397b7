"""Twenty broken lines, one at a time: ``python -m scripts.mutants [--tree DIR]`` runs tests of the first tier on each.

A mutant is caught when a test of its area fails, and survives when none does. Each runs on a copy of the tree with one
line changed; ``--tree`` names another checkout, to compare two versions of the tests. The exit status is 1 where one
survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALGEBRA = ("tests/laws", "tests/methods", "tests/linalg", "tests/test_rounds.py")
SECURE, PRIVACY = ("tests/security/secure_aggregation",), ("tests/security/privacy",)


class Mutant(NamedTuple):
    """``line`` of a file under src/fedlora becomes ``instead``; the tests that should notice."""

    file: str
    line: str
    instead: str
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "rounds.py",
        "return [n / sum(examples) for n in examples]",
        "return [1 / len(examples)] * len(examples)",
        ALGEBRA,
    ),
    Mutant(
        "rounds.py",
        "return [w * upload.factor / total for w, upload in zip(weights, uploads)]",
        "return [w * upload.factor for w, upload in zip(weights, uploads)]",
        (*ALGEBRA, "tests/security/test_robust.py", "tests/security/test_validation.py"),
    ),
    Mutant(
        "rounds.py",
        "base_update = tuple(Factors(f.U[i], f.V[i]) for f in outcome.base_update)",
        "base_update = tuple(Factors(f.U[0], f.V[i]) for f in outcome.base_update)",
        ALGEBRA,
    ),
    Mutant(
        "rounds.py",
        "uploads = sorted(uploads, key=lambda upload: upload.turn.client)",
        "uploads = list(uploads)",
        (*ALGEBRA, "tests/engines"),
    ),
    Mutant(
        "linalg/factors.py",
        "return Factors(Q, R @ f.V)",
        "return Factors(Q, R.mT @ f.V)",
        (*ALGEBRA, "tests/engines/test_base_updates.py", "tests/export/test_peft.py"),
    ),
    Mutant("linalg/factors.py", "root = S[..., :rank].sqrt()", "root = S[..., :rank]", ALGEBRA),
    Mutant(
        "linalg/factors.py",
        "sign = torch.linalg.det(P @ Qt).sign()",
        "sign = torch.linalg.det(P @ Qt).sign().abs()",
        ALGEBRA,
    ),
    Mutant("linalg/factors.py", "parts = _merge(parts, side=0)", "parts = _merge(parts, side=1)", ALGEBRA),
    Mutant(
        "methods/fedrot_lora.py",
        'return {"A": R.mT @ work.end["A"], "B": work.end["B"] @ R}',
        'return {"A": R @ work.end["A"], "B": work.end["B"] @ R.mT}',
        ALGEBRA,
    ),
    Mutant(
        "methods/lora_fair.py",
        'return Outcome({**shared, "A": A, "B": B + correction.to(B.dtype)})',
        'return Outcome({**shared, "A": A, "B": B - correction.to(B.dtype)})',
        ALGEBRA,
    ),
    Mutant(
        "methods/flora_na.py",
        "layers, w = [*layers, shared], [*w, 0.0]",
        "layers, w = [*layers, shared], [*w, 1.0]",
        ALGEBRA,
    ),
    Mutant(
        "methods/ravan.py", 'work.end[f"s{i}"] * work.end[f"H{i}"]', 'work.start[f"s{i}"] * work.end[f"H{i}"]', ALGEBRA
    ),
    Mutant(
        "security/secure_aggregation/fixed_point.py",
        "scaled = flat[chunk].double().numpy() * weight",
        "scaled = flat[chunk].double().numpy()",
        SECURE,
    ),
    Mutant("security/secure_aggregation/masks.py", "return key, 1 if number < peer else -1", "return key, 1", SECURE),
    Mutant(
        "security/secure_aggregation/shamir.py",
        "rest = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]",
        "rest = [0 for _ in range(threshold - 1)]",
        SECURE,
    ),
    Mutant(
        "security/secure_aggregation/server.py",
        "if len(senders) < self.session.threshold:",
        "if len(senders) < 1:",
        SECURE,
    ),
    Mutant(
        "security/privacy/client_level.py",
        "by = clip_factor(math.sqrt(sum(float(x.square().sum()) for x in changes.values())), clip)",
        "by = 1.0",
        PRIVACY,
    ),
    Mutant(
        "security/privacy/client_level.py",
        "(changes[part, leaf] + std * noise) / by",
        "(changes[part, leaf] + noise) / by",
        PRIVACY,
    ),
    Mutant(
        "security/privacy/dp_sgd.py",
        "self.noise * self.clip * noise) / (q * rows)",
        "self.noise * noise) / (q * rows)",
        PRIVACY,
    ),
    Mutant(
        "security/privacy/accounting.py",
        "if noise == 0:\n        return math.inf",
        "if noise == 0:\n        return 0.0",
        PRIVACY,
    ),
]


def apply(mutant: Mutant, source: Path) -> None:
    """Changes the line in place. ``SystemExit`` where it does not stand there once."""
    path = source / mutant.file
    text = path.read_text()
    if text.count(mutant.line) != 1:
        raise SystemExit(
            f"{mutant.file} holds {mutant.line!r} {text.count(mutant.line)} times; it should be there once."
        )
    path.write_text(text.replace(mutant.line, mutant.instead))


def survives(mutant: Mutant, tree: Path) -> str | None:
    """None where every test passes; else the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".*", "build", "runs"))
        apply(mutant, copy / "src" / "fedlora")
        tests = [test for test in mutant.tests if (copy / test).exists()]
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FEDLORA_SHARED": str(copy),
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
        found = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        failed = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if found.returncode not in (0, 1) or (found.returncode == 1 and not failed):
            raise SystemExit(
                f"{mutant.file}: pytest ended with {found.returncode}:\n{found.stdout[-2000:]}{found.stderr[-2000:]}"
            )
        return failed[0].split(" - ")[0] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a checkout of fedlora (default: this one)")
    parser.add_argument("--only", help="mutants of files whose name holds this")
    arguments = parser.parse_args()
    alive = 0
    for mutant in MUTANTS:
        if arguments.only and arguments.only not in mutant.file:
            continue
        began = time.monotonic()
        caught = survives(mutant, arguments.tree)
        alive += caught is None
        end = "SURVIVES" if caught is None else f"is caught by {caught}"
        print(f"{mutant.file}: {mutant.instead!r} {end} ({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
