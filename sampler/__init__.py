"""Sampling semantics: parameters, the plain torch reference, and the kernels proven against it."""
