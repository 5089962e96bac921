"""MkDocs' hook: the repository's pages as a site, and the pages that are made from the code.

docs/ is the site's root and README.md its home. Files elsewhere in the repository that pages link
keep their path, so links between the two are rewritten: what leads somewhere on GitHub leads there
on the site.
"""

import dataclasses
import html
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from repa_fast import cli, command
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.flags import grouped

ROOT = Path(__file__).parents[1]
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/*/README.md", "csrc/README.md")
"""What the site has besides docs/ and what pages link."""
CODE_OR_LINK = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)|`(?:[^`\n]|\n(?!\n))*`|(?<=\]\()(?P<link>[^()\s]+)(?=[)\s])",
    re.M | re.S,
)
CODE_OR_LIST = re.compile(
    r"^(?P<fence>```|~~~).*?^(?P=fence)|^(?![-*#|<>\s]|\d+\. )[^\n]+\n(?=(?:[-*]|1\.) )",
    re.M | re.S,
)
KINDS = {int: "integer", float: "number", str: "text", Path: "path"}


def site_path(path: str) -> str:
    """Return where the site has a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(path: str) -> str:
    """Return which file of the repository is at a path of the site."""
    if path == "index.md":
        return "README.md"
    return f"docs/{path}" if (ROOT / "docs" / path).is_file() else path


def target(link: str, page: str) -> str | None:
    """Return the file of the repository that a link on a page leads to; None if to none."""
    path, here = link.partition("#")[0], posixpath.dirname(page)
    found = posixpath.normpath(posixpath.join(here, path))
    return found if path and ":" not in path and (ROOT / found).is_file() else None


def links(text: str) -> Iterator[str]:
    """Yield where a page's links and pictures lead, those in code left out."""
    return (match["link"] for match in CODE_OR_LINK.finditer(text) if match["link"])


def rewritten(text: str, page: str) -> str:
    """Return a page's text with the links that lead to the same files on the site."""
    here = posixpath.dirname(site_path(page))

    def moved(match: re.Match) -> str:
        found = match["link"] and target(match["link"], page)
        if not found:
            return match[0]
        path = posixpath.relpath(site_path(found), here or ".")
        return path + "".join(match["link"].partition("#")[1:])

    return CODE_OR_LINK.sub(moved, text)


def spaced(text: str) -> str:
    """Return a page's text with an empty line before a list, which GitHub does not need."""
    return CODE_OR_LIST.sub(lambda match: match[0] + ("" if match["fence"] else "\n"), text)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what pages link outside docs/, and what is made from the code to its pages."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += (str(file.relative_to(ROOT)) for glob in ALWAYS for file in ROOT.glob(glob))
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            made = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
            files.append(made)
        if path.endswith(".md"):
            found = (target(link, path) for link in links((ROOT / path).read_text()))
            waiting += filter(None, found)
    for path, generate in GENERATED.items():
        files.remove(files.src_uris[path])
        files.append(File.generated(config, path, content=generate()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make a page of the repository one of the site; the home has no pages beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return spaced(rewritten(markdown, repository_path(page.file.src_uri)))


def commands() -> str:
    """Return the page of all commands: what is committed of it, and a section for each."""
    parts = [(ROOT / "docs/reference/commands.md").read_text()]
    for name, entry in cli.COMMANDS.items():
        summary = f"{sentence(entry.summary)}.\n"
        parts.append(f"## {name}\n\n{summary}")
        _, config = cli.load(name)
        if name == "train":
            parts.append("[Its flags](flags.md) have a page of their own.\n")
        elif config is None:
            parts.append(f"`repa-fast {name} --help` lists its flags.\n")
        else:
            text = " ".join(config.__doc__.split()).removeprefix(f"`repa-fast {name}`: ")
            parts += [] if f"{sentence(text)}\n" == summary else [f"{sentence(text)}\n"]
            parts.append(table(config, command.mirror(config), f"{name.replace(' ', '-')}--"))
    return "\n".join(parts)


def train_flags() -> str:
    """Return the page of a training run's flags, in the groups of `train --help`."""
    parts = [(ROOT / "docs/reference/flags.md").read_text()]
    plain = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for group in dataclasses.fields(grouped(types.SimpleNamespace(**plain))):
        if group.default_factory is not dataclasses.MISSING:
            parts.append(f"## {group.name.capitalize()}\n")
            parts.append(table(TrainConfig, group.default_factory, ""))
    return "\n".join(parts)


GENERATED = {"reference/commands.md": commands, "reference/flags.md": train_flags}


def table(config: type, shown: type, prefix: str) -> str:
    """Return a table of flags.

    Args:
        config: the dataclass whose docstrings are the sentences.
        shown: the dataclass that tyro would parse, of some of its fields.
        prefix: what the flags' anchors begin with.
    """
    texts, hints = command.sentences(config), typing.get_type_hints(shown)
    positional = {f.name for f in dataclasses.fields(config) if f.metadata.get("positional")}
    rows = ["| flag | value | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(shown):
        flag = field.name if field.name in positional else "--" + field.name.replace("_", "-")
        anchor = f"{{ #{prefix}{field.name.replace('_', '-')} }}"
        cells = [kind(hints[field.name]), default(field), escaped(texts.get(field.name, ""))]
        rows.append(f"| `{flag}`{anchor} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def kind(hint: object) -> str:
    """Return what a flag of a type takes: its choices, or a word for them."""
    given = [one for one in typing.get_args(hint) if one not in (type(None), ...)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{one}`" for one in given)
    if typing.get_origin(hint) is tuple:
        return " ".join(map(kind, given)) + (" ..." if ... in typing.get_args(hint) else "")
    if given:
        return " or ".join(map(kind, given))
    return "on or off" if hint is bool else KINDS[hint]


def default(field: dataclasses.Field) -> str:
    """Return a flag's default; nothing for one that is empty."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "" if value in (None, "") else f"`{value}`"


def sentence(text: str) -> str:
    """Return a text `escaped`, with a capital in front."""
    return escaped(text[0].upper() + text[1:])


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    return re.sub(r"[|*]", r"\\\g<0>", html.escape(text, quote=False))
