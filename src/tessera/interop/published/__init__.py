"""Weights that others published: reading their files and renaming their tensors to ours, with nothing missing and nothing left over."""

from tessera.interop.published.backbones import gcvit, resnet, swin
from tessera.interop.published.importing import Imported, take_over
from tessera.interop.published.reading import read_state, weights_file
from tessera.interop.published.renaming import load_strictly

__all__ = ["Imported", "gcvit", "load_strictly", "read_state", "resnet", "swin", "take_over", "weights_file"]
