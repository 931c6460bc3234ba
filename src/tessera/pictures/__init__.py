"""Everything drawn: predictions and truth over their images, sheets of them, and how figures look."""
