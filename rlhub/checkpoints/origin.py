"""What a published model folder holds beside what this package reads, so that a model written again still loads elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("*.py", "generation_config.json")  # modelling code that `auto_map` names, and settings of generation
NAMED_BY_CODE = ("architectures", "model_type")  # which the published modelling code looks itself up by


@dataclass(frozen=True)
class Origin:
    """The folder that a network was loaded from, and its config.json as it was then."""

    folder: Path
    config: dict[str, Any]

    def complete(self, config: dict[str, Any], fixed: Collection[str]) -> dict[str, Any]:
        """A config.json of ours with the fields that the folder's had besides, such as `auto_map`.

        Args:
            config: ours, which says what the network is.
            fixed: fields with one supported value, which the folder's own spelling of it (null, say) replaces.
        """
        ours = {key: value for key, value in config.items() if key not in fixed and key not in NAMED_BY_CODE}
        nested = {key: self.config[key] | value for key, value in ours.items() if _is_object(value) and _is_object(self.config.get(key))}
        return config | self.config | ours | nested

    def copy_files(self, folder: Path) -> None:
        """Copy the files that other programs need to load the model; those that are gone by now are left out."""
        for pattern in FILES:
            for file in sorted(self.folder.glob(pattern)):
                shutil.copyfile(file, folder / file.name)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)
