"""Other people's formats, each a package with one entrance; the core does without them."""
