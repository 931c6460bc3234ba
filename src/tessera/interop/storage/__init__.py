"""Archives of a dataset, from S3 or a folder, unpacked into the project."""

from tessera.interop.storage.fetch import fetch_dataset

__all__ = ["fetch_dataset"]
