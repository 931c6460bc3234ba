"""Reproducible segmentation and detection experiments: from raw annotations to TensorRT numbers in a paper's table."""

__version__ = "0.2.0"
