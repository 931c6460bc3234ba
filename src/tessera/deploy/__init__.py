"""From trained weights to graphs and engines, and the proof that they compute the same."""
