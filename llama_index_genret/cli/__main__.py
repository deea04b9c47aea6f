"""`python -m llama_index_genret.cli`, as `genret`."""

from llama_index_genret.cli import main

main()
