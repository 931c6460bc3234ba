"""Tables from evaluation files. Reads JSON only, needs no torch."""
