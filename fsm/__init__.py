"""Constrained decoding: languages to byte automata, automata to token tables. Knows no actors, no HTTP, no models."""
