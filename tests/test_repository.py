"""What is read by other programs: how the project is cited, and what its issues ask for."""

import datetime
import re
import tomllib
from pathlib import Path

import yaml

from repa_fast import __version__, doctor

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


def test_the_forms_of_issues_are_forms_and_a_bug_report_needs_the_doctor():
    folder = ROOT / ".github/ISSUE_TEMPLATE"
    forms = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yml")}
    assert forms.keys() == {"bug_report", "feature_request", "config"}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        names = [field["id"] for field in fields]
        assert len(set(names)) == len(names) and all(f["attributes"]["label"] for f in fields)
    fields = {f["id"]: f for f in forms["bug_report"]["body"] if f["type"] != "markdown"}
    needed = {n for n, f in fields.items() if f.get("validations", {}).get("required")}
    assert needed == {"doctor", "command", "log", "expected"} and "error-file" in fields
    assert "`repa-fast doctor`" in fields["doctor"]["attributes"]["label"]
    assert "render" not in fields["doctor"]["attributes"]  # which would put fences around fences
    assert "CONTRIBUTING.md" in (ROOT / ".github/pull_request_template.md").read_text()


def test_every_extra_that_is_named_is_there_and_the_doctor_looks_for_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    files = [*ROOT.glob("repa_fast/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    named = {name for f in files for name in re.findall(r"repa-fast\[(\w+)\]", f.read_text())}
    assert {"eval", "wandb"} <= named <= extras.keys()
    known = {distribution for names in doctor.PACKAGES.values() for distribution in names}
    of_users = extras.keys() - {"dev", "docs"}
    assert {package for extra in of_users for package in extras[extra]} <= known
    assert "Typing :: Typed" in project["classifiers"]
