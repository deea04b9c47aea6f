"""Benchmarks of the identifier trie and of the beam step: `make bench`, or `python -m integration.bench.<name>`."""
