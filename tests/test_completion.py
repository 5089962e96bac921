"""Shell completion: tyro's script of the whole table, asked in bash what would follow."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repa_fast import cli
from repa_fast.configs.presets import PRESETS
from repa_fast.eval.sample import SampleConfig
from tests.refusals import refused

pytest.importorskip("tyro")

ASK = """
source "$1"
while read -ra COMP_WORDS; do
    [ "${COMP_WORDS[-1]}" = _ ] && COMP_WORDS[-1]=""
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _tyro_repa_fast
    (IFS=" "; echo "${COMPREPLY[*]}")
done
"""


def script(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert not stop.value.code
    return capsys.readouterr().out


def test_bash_completes_commands_of_one_and_two_words_flags_and_choices(capsys, tmp_path):
    file = tmp_path / "completion"
    file.write_text(script(capsys, "--tyro-print-completion", "bash"))
    names = [f"--{field.name}".replace("_", "-") for field in dataclasses.fields(SampleConfig)]
    first = {name.split()[0] for name in cli.COMMANDS}
    asked = {
        "repa-fast pre": {"prepare", "presets"},
        "repa-fast _": first | {"-h", "--help"},
        "repa-fast prepare im": {"images", "import-official"},
        "repa-fast sample --c": {name for name in names if name.startswith("--c")},
        "repa-fast sample --no-heu": {"--no-heun"},
        "repa-fast prepare images --resol": {"--resolution"},
        "repa-fast train --preset dig": {name for name in PRESETS if name.startswith("dig")},
        "repa-fast train --preset digits --align _": {"repa", "sra"},
        "repa-fast train --preset=digits --residual": {"--residual-dtype"},
        "repa-fast bench --h": {"--help"},
    }
    assert {"--ckpt", "--cfg-scale", "--classes"} <= asked["repa-fast sample --c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", file],
        input="\n".join(asked) + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.stderr == ""
    said = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(asked, said, strict=True)) == asked
    assert "complete -F _tyro_repa_fast repa-fast" in file.read_text()


@pytest.mark.usefixtures("heavy")
def test_a_commands_own_is_the_whole_tables_and_other_shells_have_theirs(capsys):
    whole = script(capsys, "--tyro-print-completion", "zsh")
    assert whole.startswith("#compdef repa-fast") and "'--optimizer-impl'" in whole
    assert script(capsys, "prepare", "images", "--tyro-print-completion", "zsh") == whole
    assert "complete" in script(capsys, "--tyro-print-completion", "fish")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--tyro-print-completion"], "shell is '', expected one of bash, zsh, fish, tcsh"),
        (["--tyro-print-completion", "bsh"], "shell is 'bsh', .*; did you mean bash"),
    ],
)
def test_an_unknown_shell_is_refused(capsys, argv, words):
    refused(lambda: cli.complete(argv), words)
    assert cli.main(["train", *argv]) == 2
    assert capsys.readouterr().err.startswith("repa-fast: ")


def test_tcsh_has_its_script_or_names_the_package_that_it_needs(capsys):
    try:
        import shtab  # noqa: F401
    except ImportError:
        argv = ["--tyro-print-completion", "tcsh"]
        refused(lambda: cli.complete(argv), "tcsh, which needs the package shtab")
    else:
        assert "complete repa-fast" in script(capsys, "--tyro-print-completion", "tcsh")
