"""Fuzzing guided by coverage: ``python -m tests.fuzz.guided "upload in int8" -runs=100000``; needs atheris.

Atheris is no dependency: ``pip install atheris`` where its wheels fit the machine. What follows the reader's name is
libFuzzer's own (``-max_total_time=60``, ``-seed=1``, a folder for its corpus).
"""

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed; pip install atheris, or play without guidance: python -m tests.fuzz.")

with atheris.instrument_imports(include=["fedlora.files", "fedlora.engines.comm.codecs._base", "fedlora.engines.comm.codecs", "fedlora.engines.comm.compression",
                                         "fedlora.training.peft_folder", "fedlora.files", "fedlora.flower"]):  # fmt: skip
    from tests.fuzz.playing import one
    from tests.fuzz.targets import targets


def main() -> None:
    name, *rest = sys.argv[1:] or ["header"]
    known = targets()
    if name not in known:
        sys.exit(f"there is no reader {name!r}; they are {', '.join(known)}.")
    target = known[name]()
    begin = Path(tempfile.mkdtemp(prefix="fedlora-corpus-"))
    for number, data in enumerate(target.corpus):
        (begin / str(number)).write_bytes(data)
    atheris.Setup([sys.argv[0], *rest, str(begin)], lambda data: one(target, data))
    atheris.Fuzz()


main()
