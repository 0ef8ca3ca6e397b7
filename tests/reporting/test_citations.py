"""What is to be cited: every published method says it, every entry is BibTeX, and a run names all that it used."""

import re
from pathlib import Path

import pytest

from fedlora.adapters import ADAPTERS, LoRA
from fedlora.files import save_json, write
from fedlora.methods import METHODS
from fedlora.reporting import citations as citing
from fedlora.reporting.citations import BibEntry, collect_citations, parse_bibtex
from fedlora.reporting.method_catalog import build_reference
from fedlora.schema import ConfigError, dumps
from fedlora.security.attacks import ATTACKS
from fedlora.security.robust import ROBUST_RULES
from tests.fixtures.resume import small

UNPUBLISHED = {"local", "svd"}
NEEDED = {"inproceedings": "booktitle", "article": "journal", "misc": "year"}


def everything() -> dict[str, str]:
    """Where -> BibTeX text, of all that has any."""
    found = {f"method {name}": build_reference(METHODS.load(name)).cite for name in METHODS.names()}
    found |= {
        f"adapter {name}": (LoRA(use_rslora=True) if kind is LoRA else kind).cite
        for name, kind in ADAPTERS.classes().items()
    }
    found |= {f"attack {name}": ATTACKS.load(name).cite for name in ATTACKS.names()}
    found |= {f"robust {name}": ROBUST_RULES.load(name).cite for name in ROBUST_RULES.names()}
    for table in (citing.PRIVACY, citing.ACCOUNTANTS, citing.OPTIMIZERS):
        found |= {f"setting {name}": text for name, text in table.items()}
    return found | {"secure aggregation": citing.SECURE_AGGREGATION}


def test_every_published_method_says_what_to_cite():
    silent = {name for name in METHODS.names() if not METHODS.load(name).cite}
    assert silent == UNPUBLISHED


@pytest.mark.parametrize("where", sorted(everything()))
def test_entries_are_bibtex_with_what_their_kind_needs(where):
    for entry in parse_bibtex(everything()[where]):
        fields = dict(entry.fields)
        assert {"title", "author", "year", NEEDED[entry.kind]} <= fields.keys(), where
        assert re.fullmatch(r"\d{4}", fields["year"]) and re.fullmatch(r"[a-z]+\d{4}[a-z]+", entry.key)
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields.get("eprint", "2000.00000"))
        assert "eprint" in fields or "doi" in fields
        assert parse_bibtex(str(entry)) == [entry], "what is printed reads back"


def test_a_paper_has_one_entry_wherever_it_is_cited():
    seen: dict[str, BibEntry] = {}
    for text in everything().values():
        for entry in parse_bibtex(text):
            assert seen.setdefault(entry.key, entry) == entry
    papers = [dict(e.fields).get("eprint") or dict(e.fields)["doi"] for e in seen.values()]
    assert len(set(papers)) == len(papers), "a paper has two keys"


def test_facts_are_those_of_the_docstrings():
    """Year, arXiv number and title stand in the file that says them, too: one that was mistyped would differ."""
    import inspect
    import sys

    for name in set(METHODS.names()) - UNPUBLISHED:
        kind = METHODS.load(name)
        text = " ".join((inspect.getdoc(sys.modules[kind.__module__]) or "").split())
        (entry,) = parse_bibtex(kind.cite)
        fields = dict(entry.fields)
        assert f"arxiv.org/abs/{fields['eprint']}" in text and fields["year"] in text, name
        assert fields["title"].replace("{", "").replace("}", "") in text, name
        assert fields.get("booktitle", "") in text and fields["author"].removesuffix(" and others") in text, name


def test_a_run_cites_all_that_it_used(tmp_path):
    config = small(
        "fedex-lora", "adapter={name='lora',use_rslora=true}", "robust={name='krum'}", "attack={name='sign-flip'}",
        "compression={up=['top-k','int8'],top_k=0.1}",
    )  # fmt: skip
    write(tmp_path / "config.toml", dumps(config.table).encode())
    keys = [entry.key for entry in collect_citations(str(tmp_path))]
    assert keys == [
        "fedlora", "singhal2025fedex", "hu2022lora", "kalajdzievski2023rslora", "blanchard2017krum", "li2019rsa",
        "stich2018sparsified",
    ]  # fmt: skip


def test_privacy_and_the_servers_optimizer(tmp_path):
    private = small(
        "fedit", "privacy={level='client',noise_multiplier=1.0,accountant='rdp'}", "method.weighting='uniform'"
    )
    adam = small("fedit", "server={optimizer='adam'}")
    hidden = small("fedit", "flower.secure_aggregation=true")
    found = [
        [e.key for c in citing.iterate_bibtex(config) for e in parse_bibtex(c)] for config in (private, adam, hidden)
    ]
    assert found == [
        ["zhang2024fedit", "hu2022lora", "mcmahan2018dp", "mironov2019renyi"],
        ["zhang2024fedit", "hu2022lora", "reddi2021adaptive"],
        ["zhang2024fedit", "hu2022lora", "bonawitz2017secure"],
    ]


def test_a_comparison_cites_every_method_once(tmp_path):
    runs = [{"table": small(name).table} for name in ("fedit", "ravan", "fedit")]
    save_json(tmp_path / "comparison.json", {"rows": [], "runs": runs})
    assert [e.key for e in collect_citations(str(tmp_path))] == [
        "fedlora",
        "zhang2024fedit",
        "hu2022lora",
        "raje2025ravan",
    ]


def test_a_method_and_what_is_none():
    text = "\n".join(map(str, collect_citations("fedsa-lora")))
    assert text.startswith("@misc{fedlora,\n  title = {") and "@inproceedings{guo2025fedsa," in text
    assert "  eprint = {2410.01463},\n" in text
    assert [e.key for e in collect_citations("svd")] == ["fedlora"]
    with pytest.raises(ConfigError, match="no method 'fedsalora'; did you mean 'fedsa-lora'.*nor is it a run's folder"):
        collect_citations("fedsalora")


@pytest.mark.parametrize("text", ["title", "@misc{a, title = {x", "@misc{a, title = x}", "@misc{a title = {x}}"])
def test_what_is_no_bibtex_is_refused(text):
    with pytest.raises(ValueError, match="BibTeX"):
        parse_bibtex(text)


def test_the_docs_know_the_command():
    assert "fedlora cite" in (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")
