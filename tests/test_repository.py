"""What is read by other programs: how the project is cited, and what its issues ask for."""

import datetime
from pathlib import Path

import yaml

from repa_fast import __version__

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version_and_names_the_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    needed = {"cff-version", "message", "title", "authors"}  # by the schema of CFF 1.2.0
    assert needed < cited.keys() and cited["cff-version"] == "1.2.0"
    assert cited["version"] == __version__ and isinstance(cited["date-released"], datetime.date)
    assert cited["authors"] == [{"name": "repa-fast authors"}] and cited["license"] == "MIT"
    papers = {paper["identifiers"][0]["value"]: paper for paper in cited["references"]}
    assert {name: len(paper["authors"]) for name, paper in papers.items()} == {
        "arXiv:2410.06940": 7,
        "arXiv:2505.02831": 9,
    }
    for name, paper in papers.items():
        assert paper["url"].endswith(name.removeprefix("arXiv:"))
        assert {"type", "title", "authors"} < paper.keys()
