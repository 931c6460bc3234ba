"""KITTI folders to COCO shards, and back."""

from tessera.interop.kitti.convert import convert_dataset, describe
from tessera.interop.kitti.export import export_kitti

__all__ = ["convert_dataset", "describe", "export_kitti"]
