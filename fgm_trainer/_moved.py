"""Module paths of 0.1, which name the same modules as the new ones: `fgm_trainer.geometry` and so on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "clipping": "perturbation.clipping",
    "driving": "engine.driver",
    "geometry": "perturbation.geometry",
    "inspection": "perturbation.lookups",
    "monitoring": "metrics",
    "objective": "perturbation.divergence",
    "passes": "perturbation.calls",
    "plotting": "robustness.plotting",
    "randomness": "engine.dropout",
    "raw": "loops",
    "refusals": "compatibility",
    "schedule": "engine.schedule",
    "target": "perturbation.target",
    "targets": "perturbation.targets",
    "weights": "perturbation.weights",
}
PACKAGE = __name__.rpartition(".")[0]


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == PACKAGE and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{PACKAGE}.{MOVED[spec.name.rpartition('.')[2]]}")
        # The import system is about to write the old name's over it.
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


sys.meta_path.append(_Moved())
