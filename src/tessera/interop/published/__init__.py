"""Weights that others published: reading their files and renaming their tensors to ours, with nothing missing and nothing left over."""

from tessera.interop.published import gcvit, resnet, swin
from tessera.interop.published.importing import Imported, take_over
from tessera.interop.published.reading import load_strictly, read_state, weights_file

__all__ = ["Imported", "gcvit", "load_strictly", "read_state", "resnet", "swin", "take_over", "weights_file"]
