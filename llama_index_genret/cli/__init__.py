"""`genret`: a thin shell over the library. The only package that prints or reads the environment.

Results go to stdout, as tables or, with `--json`, as one machine-readable object; logs and bars go to stderr.
Exit code 0, 1 (failed: one line on stderr) or 2 (usage).
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from llama_index_genret.cli import evaluate, index, recall, serve, train
from llama_index_genret.cli.browse import command as browse_command
from llama_index_genret.cli.demo import command as demo_command
from llama_index_genret.cli.output import log, take_any_character, visible
from llama_index_genret.errors import GenretError

app = typer.Typer(
    help="A multimodal LLM that has memorised your images.", no_args_is_help=True, pretty_exceptions_enable=False
)

app.command()(index.index)
app.command()(train.write_queries)
app.command()(train.train)
app.command()(index.add)
app.command()(index.remove)
app.command()(recall.query)
app.command()(recall.ask)
app.command(name="eval")(evaluate.evaluate)
app.command()(train.tune)
app.command()(recall.batch)
app.command()(browse_command.browse)
app.command()(serve.export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command()(index.inspect)
app.command()(demo_command.demo)


def main() -> NoReturn:
    """Entry point: turns errors of ours into one line on stderr and exit code 1."""
    take_any_character()
    try:
        app(standalone_mode=True)
    except GenretError as error:
        log.print(visible(f"error: {error}"), style="red", soft_wrap=True)
        sys.exit(1)
    sys.exit(0)
