"""Stands in for torchvision, which timm imports and whose wheel does not load beside every torch.

Every name of every submodule is an empty class, and every name of such a class is its text. timm's
networks use none of them.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

SUBMODULES = ("datasets", "ops", "ops.misc", "transforms", "transforms.functional", "io")


class _Named(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


for _name in SUBMODULES:
    _module = _Module(f"{__name__}.{_name}")
    _module.__path__ = []
    _module.__spec__ = ModuleSpec(_module.__name__, None, is_package=True)
    sys.modules[_module.__name__] = _module
    _parent, _, _child = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
