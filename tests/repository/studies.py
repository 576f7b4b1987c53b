"""`modules_of`: a study's modules, which have the names of those of other studies."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parents[2] / "studies"


def modules_of(study: str) -> dict[str, ModuleType]:
    """The modules of a study by name; afterwards, these names import what they imported before."""
    folder = STUDIES / study
    names = {path.stem for path in folder.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(name) for name in sorted(names)}
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
