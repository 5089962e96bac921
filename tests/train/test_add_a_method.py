"""The example of docs/add-a-method.md works as it stands on the page."""

import re
import sys
import types
from pathlib import Path

from repa_fast import objective
from repa_fast.configs import presets

PAGE = Path(__file__).parents[2] / "docs/add-a-method.md"


def test_the_class_the_preset_and_the_test_of_the_page_do_what_it_says(make_state, monkeypatch):
    of_class, of_preset, of_test = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S
    )
    module = types.ModuleType("patches")
    monkeypatch.setitem(sys.modules, "patches", module)
    exec(of_class, vars(module))
    monkeypatch.setitem(objective.ALIGNMENTS, "patches", module.Patches)
    monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
    exec(of_preset, vars(presets))
    assert "patches" in presets.table({"digits-patches": presets.PRESETS["digits-patches"]})
    names: dict = {}
    exec(of_test, names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test(make_state)
