"""A TAO spec on disk, imported."""

from pathlib import Path
from typing import Any

import yaml

from tessera.interop.tao import Import, import_spec


def read(folder: Path, family: str | None, values: dict[str, Any]) -> Import:
    """``values`` are overrides; the project is another folder, which does not exist."""
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return import_spec([path], "coco", model=family, root=folder / "project")
