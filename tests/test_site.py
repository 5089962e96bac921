"""The site of the documentation: pages made from the code, and links that lead somewhere."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from pymdownx.slugs import slugify

from repa_fast import cli, command
from repa_fast.configs.config import PARTS, TrainConfig

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("docs_site", ROOT / "docs/site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)
PAGES = sorted(
    str(file.relative_to(ROOT))
    for pattern in (*site.ALWAYS, "docs/**/*.md", "benchmarks/results/**/*.md")
    for file in ROOT.glob(pattern)
)


@pytest.fixture(scope="module")
def commands():
    return site.commands()


@pytest.fixture(scope="module")
def flags():
    return site.train_flags()


def flags_in(text: str) -> list[str]:
    """The flags, or words without one, in the first column of a page's tables."""
    return re.findall(r"^\| `([\w-]+)`", text, re.M)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_every_command_is_on_the_page_with_every_flag(commands):
    sections = dict(part.split("\n", 1) for part in commands.split("\n## ")[1:])
    assert list(sections) == list(cli.COMMANDS)
    for name, text in sections.items():
        assert site.sentence(cli.COMMANDS[name].summary) in text
        config = cli.load(name)[1]
        fields = dataclasses.fields(config) if config else ()
        expected = [f.name if f.metadata.get("positional") else flag(f.name) for f in fields]
        assert flags_in(text) == expected
    row = "| `--sheet`{ #info--sheet } | text |  | PNG to write of 25 rows of the dataset, spread "
    assert row in sections["info"] and "| `path`{ #info--path } | text | required |" in commands
    assert "| `--classes`{ #sample--classes } | text ... |  |" in sections["sample"]


def test_every_flag_of_training_is_on_its_page_once_in_the_groups_of_the_help(flags):
    assert re.findall(r"^## (.+)", flags, re.M) == [name.capitalize() for name in PARTS]
    names = [flag(field.name) for field in dataclasses.fields(TrainConfig)]
    assert sorted(flags_in(flags)) == sorted(names)
    for sentence in command.sentences(TrainConfig).values():
        assert site.escaped(sentence) in flags


@pytest.mark.parametrize(
    "row",
    [
        "`--seed`{ #seed } | integer | `0` | Determines initial weights, sample order and all",
        "`--parallel`{ #parallel } | `ddp`, `fsdp`, `hsdp` | `ddp` | Several processes: a copy",
        "`--micro-batch`{ #micro-batch } | integer or `auto` | `auto` | Images per forward pass",
        "`--verify`{ #verify } | on or off | on | Compare checksums",
        "`--enc-type`{ #enc-type } | text |  | Frozen encoders to align with",
        "`--align`{ #align } | `repa`, `sra` | `repa` | What hidden states are aligned with",
    ],
)
def test_a_row_has_what_a_flag_takes_and_its_default(flags, row):
    assert f"\n| {row}" in flags


@pytest.mark.parametrize(
    "page, link, moved",
    [
        ("README.md", "docs/data.md", "data.md"),
        ("README.md", "docs/data.md#columns", "data.md#columns"),
        ("README.md", "docs/images/demo-loss.png", "images/demo-loss.png"),
        ("README.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("CONTRIBUTING.md", "README.md", "index.md"),
        ("docs/performance.md", "../README.md#data", "index.md#data"),
        ("docs/performance.md", "../kernels/adaln/README.md", "kernels/adaln/README.md"),
        ("docs/performance.md", "data.md", "data.md"),
        ("docs/reference/python.md", "../data.md", "../data.md"),
        ("docs/reference/python.md", "../../csrc/README.md", "../csrc/README.md"),
        ("kernels/adaln/README.md", "../../docs/data.md#x", "../../data.md#x"),
        ("kernels/adaln/README.md", "../attention/README.md", "../attention/README.md"),
        ("docs/data.md", "#columns", "#columns"),
        ("docs/data.md", "https://lance.org", "https://lance.org"),
        ("docs/data.md", "../no-such-file.md", "../no-such-file.md"),
    ],
)
def test_a_link_leads_to_the_same_file_on_the_site(page, link, moved):
    text = 'See [`it`]({0}), ![a picture]({0} "title"); `[code]({1})`.\n\n```\n[code]({1})\n```\n'
    assert site.rewritten(text.format(link, link), page) == text.format(moved, link)
    assert list(site.links(text.format(link, link))) == [link, link]


@pytest.mark.parametrize(
    "text, made",
    [
        ("This is:\n- one\n- two\n", "This is:\n\n- one\n- two\n"),
        ("This is:\n1. one\n", "This is:\n\n1. one\n"),
        ("- one,\n  more\n- two\n", "- one,\n  more\n- two\n"),
        ("```\ntext\n- no list\n```\n", "```\ntext\n- no list\n```\n"),
        ("It was in\n2026. That is all.\n", "It was in\n2026. That is all.\n"),
    ],
)
def test_a_list_is_one_without_an_empty_line_before_it(text, made):
    assert site.spaced(text) == made


BROKEN = (
    "[nowhere](c.md)",
    "[no such place](b.md#there-is-one)",
    "[a folder](pictures/)",
    "![no picture](pictures/a.png)",
)


def test_a_broken_link_fails(tmp_path):
    (tmp_path / "docs/pictures").mkdir(parents=True)
    page = " ".join(["[there](b.md#there-is--one)", *BROKEN])
    (tmp_path / "docs/index.md").write_text(f"# A\n\n{page}\n")
    (tmp_path / "docs/b.md").write_text("# B\n\n## There is / `one`\n")
    changed = {"nav": ["index.md", "b.md"], "hooks": [], "plugins": [], "extra_css": []}
    folders = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(ROOT / "mkdocs.yml"), exclude_docs="", **folders, **changed)
    with pytest.raises(Abort, match=f"{len(BROKEN)} warnings"):
        build_site(config)


@functools.cache
def anchors(path: str) -> set[str]:
    """Where links can lead on a page: its headings, its flags and its objects of Python."""
    generate = site.GENERATED.get(site.site_path(path))
    text = generate() if generate else (ROOT / path).read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    slug = slugify(case="lower")
    return {slug(re.sub(r"[`*]|\]\(.*?\)|\[", "", heading), "-") for heading in headings} | {
        *re.findall(r"\{ #([\w-]+) \}", text), *re.findall(r"^::: (\S+)", text, re.M)
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_place_that_are_there(page):
    broken = []
    for link in site.links((ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        found = site.target(link, page) if path else page
        if not re.match(r"https?:|mailto:", link):
            there = found and (not anchor or anchor in anchors(found))
            broken += [] if there else [link]
    assert not broken, f"{page} links {', '.join(broken)}"


@pytest.mark.usefixtures("heavy")
def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(tmp_path):
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build_site(config)
    pages = {file: file.read_text() for file in tmp_path.rglob("*.html")}
    for name in ("index", "reference/flags", "kernels/adaln/index", "CHANGELOG", "LOG"):
        assert tmp_path / f"{name}.html" in pages
    assert 'id="batch-size"' in pages[tmp_path / "reference/flags.html"]
    assert 'id="generate--num-fid-samples"' in pages[tmp_path / "reference/commands.html"]
    assert (tmp_path / "launch/train.sbatch").is_file() and not (tmp_path / "site.py").exists()
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//")
    assert not [file for file, text in pages.items() if fetched.search(text)]
