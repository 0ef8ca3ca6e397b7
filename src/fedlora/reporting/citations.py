"""BibTeX of a method, or of everything that a run used."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

from fedlora.methods import METHODS
from fedlora.registry import unknown
from fedlora.reporting.method_catalog import build_reference
from fedlora.runs.config import Config, build, read
from fedlora.runs.file_names import COMPARISON, CONFIG
from fedlora.runs.folder import read_json
from fedlora.schema import ConfigError

# Papers of settings that have no class.
PRIVACY = {
    "example": r"""@inproceedings{abadi2016dpsgd, title = {Deep Learning with Differential Privacy},
      author = {Abadi and others}, booktitle = {CCS}, year = {2016}, eprint = {1607.00133},
      archiveprefix = {arXiv}}""",
    "client": r"""@inproceedings{mcmahan2018dp, title = {Learning Differentially Private Recurrent Language Models},
      author = {McMahan and Ramage and Talwar and Zhang}, booktitle = {ICLR}, year = {2018},
      eprint = {1710.06963}, archiveprefix = {arXiv}}""",
}
ACCOUNTANTS = {
    "prv": r"""@inproceedings{gopi2021numerical, title = {Numerical Composition of Differential Privacy},
      author = {Gopi and Lee and Wutschitz}, booktitle = {NeurIPS}, year = {2021}, eprint = {2106.02848},
      archiveprefix = {arXiv}}""",
    "rdp": r"""@misc{mironov2019renyi, title = {{R{\'e}nyi} Differential Privacy of the Sampled {Gaussian} Mechanism},
      author = {Mironov and Talwar and Zhang}, year = {2019}, eprint = {1908.10530}, archiveprefix = {arXiv}}""",
}
REDDI = """@inproceedings{reddi2021adaptive, title = {Adaptive Federated Optimization}, author = {Reddi and others},
  booktitle = {ICLR}, year = {2021}, eprint = {2003.00295}, archiveprefix = {arXiv}}"""
OPTIMIZERS = {
    "momentum": """@misc{hsu2019measuring,
      title = {Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification},
      author = {Hsu and others}, year = {2019}, eprint = {1909.06335}, archiveprefix = {arXiv}}""",
    "adam": REDDI,
    "yogi": REDDI,
}
SECURE_AGGREGATION = """@inproceedings{bonawitz2017secure,
  title = {Practical Secure Aggregation for Privacy-Preserving Machine Learning},
  author = {Bonawitz and others}, booktitle = {CCS}, year = {2017}, doi = {10.1145/3133956.3133982}}"""

HEAD = re.compile(r"\s*@(\w+)\{([^\s,{}]+),")
FIELD = re.compile(r"\s*(\w+)\s*=\s*\{")
LAST = re.compile(r"\s*,?\s*\}")


@dataclass(frozen=True)
class BibEntry:
    """One BibTeX entry."""

    kind: str
    key: str
    fields: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = "".join(f"  {name} = {{{value}}},\n" for name, value in self.fields)
        return f"@{self.kind}{{{self.key},\n{rows}}}\n"


def collect_citations(what: str) -> list[BibEntry]:
    """Collect the entries for a method's name, a run's folder or a comparison's, with fedlora's first."""
    place = Path(what).expanduser()
    known = METHODS.names()
    if what in known or (":" in str(what) and not place.exists()):
        texts = [_get_bibtex(build_reference(METHODS.load(what)))]
    elif (place / COMPARISON).exists():
        runs = read_json(place / COMPARISON)["runs"]
        texts = [text for row in runs for text in iterate_bibtex(build(row["table"]))]
    elif (place / CONFIG).exists():
        texts = list(iterate_bibtex(read(place / CONFIG)))
    else:
        raise ConfigError(f"{unknown('method', what, known, 'methods').rstrip('.')}, nor is it a run's folder.")
    title = "{fedlora}: federated low-rank adaptation of pretrained transformers"
    fedlora = BibEntry("misc", "fedlora", (("title", title), ("version", version("fedlora"))))
    entries = {fedlora.key: fedlora}  # the first of each key
    for entry in (entry for text in texts for entry in parse_bibtex(text)):
        entries.setdefault(entry.key, entry)
    return list(entries.values())


def iterate_bibtex(config: Config) -> Iterator[str]:
    """Yield the BibTeX of each component that a configuration uses."""
    for part in (config.method, config.method.adapter, config.robust, config.attack):
        yield _get_bibtex(part)
    yield OPTIMIZERS.get(config.server.optimizer, "")
    if config.privacy.on:
        yield PRIVACY[config.privacy.level]
        yield ACCOUNTANTS[config.privacy.accountant]
    if config.flower.secure_aggregation:
        yield SECURE_AGGREGATION
    for chain in (config.compression.upward, config.compression.downward):
        yield from map(_get_bibtex, chain.stages if chain else ())


def _get_bibtex(component: object) -> str:
    """Return a component's BibTeX; empty if a component of another package has none."""
    return str(getattr(component, "cite", ""))


def parse_bibtex(text: str) -> list[BibEntry]:
    """Parse a BibTeX text; ``ValueError`` if it is malformed."""
    entries, at = [], 0
    while text[at:].strip():
        head = HEAD.match(text, at)
        if head is None:
            raise ValueError(
                f"no BibTeX entry begins at {text[at : at + 40]!r}; write @kind{{key, name = {{value}}, ...}}."
            )
        fields, at = [], head.end()
        while (end := LAST.match(text, at)) is None:
            field = FIELD.match(text, at + (text[at : at + 1] == ","))
            if field is None:
                raise ValueError(f"no BibTeX field begins at {text[at : at + 40]!r}; write name = {{value}}.")
            at = _find_close(text, field.end())
            fields.append((field[1], " ".join(text[field.end() : at - 1].split())))
        entries.append(BibEntry(head[1], head[2], tuple(fields)))
        at = end.end()
    return entries


def _find_close(text: str, at: int) -> int:
    """Return the index behind the brace that closes the one before ``at``."""
    depths = accumulate({"{": 1, "}": -1}.get(c, 0) for c in text[at:])
    end = next((i for i, depth in enumerate(depths, at + 1) if depth < 0), None)
    if end is None:
        raise ValueError("a brace of a BibTeX entry is not closed; close it.")
    return end
