"""Tables, figures and checks of what the stages left. Reads JSON only, needs no torch."""
