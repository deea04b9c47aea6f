"""The `genret` command: a thin shell over the library. Only this package prints or reads the environment.

Results go to stdout, as tables, or with `--json` as one JSON object. Logs and progress bars go to stderr.
The exit code is 0, 1 (failed, with one line on stderr) or 2 (wrong usage).
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from llama_index_genret.cli import evaluate, index, recall, serve, train, tune
from llama_index_genret.cli.browse import command as browse_command
from llama_index_genret.cli.demo import command as demo_command
from llama_index_genret.cli.output import escape_unencodable, log, visible
from llama_index_genret.errors import GenretError

# rich would read [eval] in a help text as markup and drop it.
app = typer.Typer(
    help="Recall images with a multimodal LLM that has memorised them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(index.index)
app.command()(train.write_queries)
app.command()(train.train)
app.command()(index.add)
app.command()(index.remove)
app.command()(recall.query)
app.command()(recall.ask)
app.command(name="eval")(evaluate.evaluate)
app.command()(tune.tune)
app.command()(recall.batch)
app.command()(browse_command.browse)
app.command()(serve.export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command()(index.inspect)
app.command()(demo_command.demo)


def main() -> NoReturn:
    """Run the command line. A `GenretError` becomes one line on stderr and exit code 1."""
    escape_unencodable()
    try:
        app(standalone_mode=True)
    except GenretError as error:
        log.print(visible(f"error: {error}"), style="red", soft_wrap=True)
        sys.exit(1)
    sys.exit(0)
