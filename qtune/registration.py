"""Makes transformers and PEFT know qtune's quantizer and adapter layer as soon as they are
imported.

They have no plug-in points that they would look up by themselves, and importing them here would
make `qtune --help` take seconds. So a finder notes when one of the two is imported and registers
when that is done: the quantizer once `transformers.modeling_utils` is there, which comes before any
model is loaded, the adapter layer after `peft`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERS = {
    "transformers.modeling_utils": "qtune.model.quantizer",
    "peft": "qtune.model.lora",
    "qtune.model.quantizer": "qtune.model.quantizer",
    "qtune.model.lora": "qtune.model.lora",
}


def install() -> None:
    """Register with what is imported already, and with the rest when it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in REGISTERS:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is not None and not getattr(spec, "_initializing", False):
            _register(name)


def _register(name: str) -> None:
    module = import_module(REGISTERS[name])
    # one that is itself being imported, and has brought the library in, has its turn at its end
    if hasattr(module, "register"):
        module.register()


class _Finder(MetaPathFinder):
    """Finds modules as Python does; those it waits for get a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in REGISTERS else None
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Another loader's work, then the registration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # the module sees the loader it would have had
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module.__name__)
