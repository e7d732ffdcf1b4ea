"""The files in `conf/clusters/`: valid by Ray's own schema or KubeRay's reference, and safe on spot machines."""

from __future__ import annotations

import configparser
import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

from orchestrator.elastic.preemption_agent import _parser

sys.path.insert(0, str(Path(__file__).parent))
from kuberay_schema import RAY_CLUSTER, RAY_JOB

CLUSTERS = Path(__file__).parents[2] / "conf/clusters"
ROOT = CLUSTERS.parents[1]
KUBERAY = {"kuberay-cluster.yaml": RAY_CLUSTER, "kuberay-job.yaml": RAY_JOB}
AUTOSCALER = ("aws-spot.yaml", "two-hosts.yaml")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTERS / name).read_text())
    return loaded


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_are_valid(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(KUBERAY[name])
    jsonschema.validate(load(name), KUBERAY[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 3),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"), 60),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "runAsRoot"),
            False,
        ),
        (("spec", "authOptions", "mode"), "password"),
        (("apiVersion",), "ray.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_mistakes(path: tuple[str | int, ...], value: object) -> None:
    broken: Any = copy.deepcopy(load("kuberay-cluster.yaml"))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAY_CLUSTER)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_of_kuberay_drain_and_are_nobodys_root(name: str) -> None:
    spec = cluster_spec(name)
    head = spec["headGroupSpec"]
    groups = spec["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head.get("serviceType") == "ClusterIP", "the job server is not for the public"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == ray_version()
    for group in [head, *groups]:
        pod = group["template"]["spec"]
        for container in [*pod["containers"], *pod["initContainers"]]:
            assert container["securityContext"]["runAsNonRoot"], container["name"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["tolerations"]
        assert any("spot" in str(term).lower() for term in node_terms(pod))
        assert all(e["operator"] == "In" for term in node_terms(pod) for e in term["matchExpressions"])
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "-m", "orchestrator.elastic.preemption_agent"]
        options = _parser().parse_args(command[3:])
        ray_s = float(
            {e["name"]: e["value"] for e in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        )
        assert options.now
        assert options.grace_s + ray_s <= pod["terminationGracePeriodSeconds"], "all before SIGKILL"
    assert all(
        e["operator"] == "NotIn" for t in node_terms(head["template"]["spec"]) for e in t["matchExpressions"]
    )


def node_terms(pod: dict[str, Any]) -> list[dict[str, Any]]:
    terms: list[dict[str, Any]] = pod["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    return terms


def ray_version() -> str:
    import ray

    return str(ray.__version__)


def test_both_kuberay_files_have_one_cluster() -> None:
    assert cluster_spec("kuberay-job.yaml") == cluster_spec("kuberay-cluster.yaml")


def test_a_job_that_lost_its_head_is_tried_again() -> None:
    spec = load("kuberay-job.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    entrypoint = shlex.split(spec["entrypoint"])
    assert entrypoint[:2] == ["orchestrator", "run"]
    assert "cluster.address=auto" in entrypoint, (
        "a job that started a cluster of its own would train on the head"
    )
    assert any(word.startswith("store=s3://") for word in entrypoint), "what is in the pod goes with it"
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"working_dir": "s3://BUCKET/projects/my-project.zip"}


@pytest.mark.parametrize("name", AUTOSCALER)
def test_autoscaler_files_are_valid_by_rays_own_code(name: str) -> None:
    config = load(name)
    validate_config(fillout_defaults(config))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(fillout_defaults({**config, "max_worker": 3}))


def test_on_aws_only_workers_are_spot_and_nothing_is_public() -> None:
    config = load("aws-spot.yaml")
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert types
    for worker in types.values():
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert worker["min_workers"] == 0
    for machine in (head, *types.values()):
        node = machine["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        # With all four given, the launcher creates no keys, roles or security groups, and needs no right to.
        assert {"KeyName", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile"} <= set(node)
    assert config["provider"]["cache_stopped_nodes"] is False


def test_aws_would_take_the_machines() -> None:
    """By botocore's model of `RunInstances`, which knows every field and its type; AWS is not asked."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    for name, machine in load("aws-spot.yaml")["available_node_types"].items():
        request = {**machine["node_config"], "MinCount": 1, "MaxCount": 1}
        request["SubnetId"] = request.pop("SubnetIds")[0]  # Ray names one of them
        report = botocore.validate.ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


@pytest.mark.parametrize("name", AUTOSCALER)
def test_ray_is_started_with_a_token_and_its_job_server_on_loopback(name: str) -> None:
    config = load(name)
    (head,) = [line for line in config["head_start_ray_commands"] if " ray start" in line]
    (worker,) = [line for line in config["worker_start_ray_commands"] if " ray start" in line]
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_systemd_units_start_in_order_and_stop_in_time() -> None:
    units = {}
    for name in ("ray-worker.service", "preemption-agent.service"):
        units[name] = configparser.ConfigParser(strict=False, interpolation=None)
        units[name].optionxform = str  # type: ignore[assignment,method-assign]
        units[name].read_string((CLUSTERS / name).read_text())
    agent = units["preemption-agent.service"]
    assert agent["Unit"]["After"] == "ray-worker.service", "so it stops first, and Ray waits for it"
    program = shlex.split(agent["Service"]["ExecStart"])
    assert program[1:3] == ["-m", "orchestrator.elastic.preemption_agent"]
    options = _parser().parse_args(program[3:])
    assert options.grace_s < float(agent["Service"]["TimeoutStopSec"])
    assert options.address in units["ray-worker.service"]["Service"]["ExecStart"]


def test_every_file_is_explained() -> None:
    text = (ROOT / "docs/clusters.md").read_text()
    for file in CLUSTERS.iterdir():
        assert file.name in text, file.name
