"""Parts that several model families share; a family imports from here and from ``backbone``, never from another family."""
