"""Run a program on the pretended card.

`python -m benchmarks.gpu.pretended [--report FILE] -m MODULE [ARGS...]` starts itself again with
the libraries preloaded, applies the patches and runs MODULE as `python -m MODULE ARGS...` would.
`python -m benchmarks.gpu.pretended --table FILE` prints a report for people.
"""

import importlib
import os
import runpy
import sys
from pathlib import Path

from benchmarks.gpu.pretended import build
from benchmarks.gpu.process import end_compile_workers

PLUGIN = "benchmarks.gpu.pretended.plugin"
USAGE = "usage: python -m benchmarks.gpu.pretended [--report FILE] -m MODULE [ARGS...]"


def parse(words: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """Our own flags, the module and its arguments; SystemExit where they are not those."""
    flags: dict[str, str] = {}
    while words and words[0] in ("--report", "--table", "-m"):
        if len(words) < 2:
            sys.exit(USAGE)
        name, value, *words = words
        if name == "-m":
            return flags, value, words
        flags[name] = value
    if "--table" in flags and not words:
        return flags, "", []
    sys.exit(USAGE)


def start_again(report: str | None) -> None:
    """Replace this process by the same command on the pretended card."""
    reason = build.why_not()
    if reason:
        sys.exit(f"pretended: {reason}")
    values = build.environment(build.build())
    if report:
        values["PRETENDED_REPORT"] = str(Path(report).resolve())
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], values)


def run(module: str, arguments: list[str]) -> None:
    """MODULE as the main program. One that is patched is imported, and then its main() called:
    what runpy executes is a copy that no patch reaches."""
    from benchmarks.gpu.pretended import patches

    patches.apply()
    if module == "pytest":
        arguments = ["-p", PLUGIN, *arguments]
    sys.argv = [module, *arguments]
    if module not in patches.BY_MODULE:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    found = importlib.import_module(module)
    sys.argv[0] = found.__file__
    sys.modules["__main__"] = found  # where environment.command() looks for its name
    sys.exit(found.main())


def main() -> None:
    """Read our own flags, then run what they ask for."""
    flags, module, arguments = parse(sys.argv[1:])
    if "--table" in flags:
        from benchmarks.gpu.pretended.report import table

        print(table(Path(flags["--table"])))
        return
    if not build.is_here():
        start_again(flags.get("--report"))
    try:
        run(module, arguments)
    finally:
        end_compile_workers()


if __name__ == "__main__":
    main()
