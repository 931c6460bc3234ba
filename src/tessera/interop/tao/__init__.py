"""Reads the experiment specs of NVIDIA TAO as they are, and turns them into parts of this project.

``table`` says what a row of the tables is; ``mask2former``, ``oneformer`` and ``deformable_detr`` hold one row for every key of TAO's
schema; ``read`` checks a file against them, ``convert`` makes our values, ``write`` the part files and the report.
"""

from tessera.interop.tao.read import TABLES
from tessera.interop.tao.write import Import, import_spec, write_files

__all__ = ["TABLES", "Import", "import_spec", "write_files"]
