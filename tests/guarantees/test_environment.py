"""Only the edges of a process read the environment. Everything else gets values as arguments."""

import ast

from tests.guarantees.package_source import modules

EDGES = {
    "cli/demo/run.py",
    "cli/models.py",
    "cli/serve.py",
    "cli/train.py",
    "serving/endpoint/app.py",  # vLLM creates the middleware without arguments
    "serving/endpoint/exit_with_parent.py",  # vLLM calls the plugin in each of its processes, without arguments
}

READS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def reads_environment(tree: ast.Module) -> bool:
    """Return whether a module uses the environment functions of `os`, as an attribute or an import."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr in READS)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and READS & {alias.name for alias in node.names})
        for node in ast.walk(tree)
    )


def test_only_process_edges_read_the_environment():
    assert {name for name, tree in modules() if reads_environment(tree)} == EDGES
