"""Prefix cache and page pool. Plain data structures: no actors, no HTTP, no torch."""
