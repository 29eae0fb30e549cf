"""Old import paths of what stands elsewhere now."""

from typing import Any

from diffusers.utils import deprecate
from diffusers.utils.import_utils import _LazyModule


class MovedModule(_LazyModule):
    """A module that is gone: gives out its names from where they stand now, and tells where that is.

    Args:
        name: the package that the keys of `import_structure` are relative to.
        module_file, import_structure: as diffusers' `_LazyModule` has them; the names by the modules of today.
        old_name: full name of the old module.
    """

    def __init__(self, name: str, module_file: str, import_structure: dict[str, list[str]], old_name: str) -> None:
        super().__init__(name, module_file, import_structure)
        self.old_name = old_name

    def __getattr__(self, name: str) -> Any:
        if name in self._class_to_module:
            message = f"Import `{name}` from `{self.__name__}.{self._class_to_module[name]}`."
            deprecate(f"{self.old_name}.{name}", "1.0.0", message, stacklevel=3)
        return super().__getattr__(name)
