"""Serve an index with vLLM: start the server, export a checkpoint, answer a file of queries."""
