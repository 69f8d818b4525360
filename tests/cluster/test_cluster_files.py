"""What a cluster is started from: cluster.yaml, and the files for hosts of one's own and for Kubernetes."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import yaml

from cluster.guide import HOSTS, RAYJOB, REPOSITORY, block
from dfkd_ray import sweep
from dfkd_ray.cli import app

CLUSTER = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8")
# The fields of KubeRay's RayJob that rayjob.yaml may use; source: KubeRay's API reference, ray.io/v1.
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "serviceAccountName": {"type": "string"},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "image": {"type": "string"},
                            "resources": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"limits": STRINGS, "requests": STRINGS},
                            },
                            "volumeMounts": {"type": "array", "items": STRINGS},
                        },
                    },
                },
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}


def fields(required: list[str], **properties: dict) -> dict:
    """An object with these fields and no others."""
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


RAYJOB_FIELDS = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        entrypoint={"type": "string"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished={"type": "integer"},
        rayClusterSpec=fields(
            ["rayVersion", "headGroupSpec"],
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=fields([], idleTimeoutSeconds={"type": "integer"}),
            authOptions=fields(["mode"], mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(["rayStartParams", "template"], rayStartParams=STRINGS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    ["groupName", "rayStartParams", "template"],
                    groupName={"type": "string"},
                    replicas={"type": "integer"},
                    minReplicas={"type": "integer"},
                    maxReplicas={"type": "integer"},
                    rayStartParams=STRINGS,
                    template=POD,
                ),
            },
        ),
    ),
)


def validated(text: str) -> dict:
    """A cluster file as Ray's own launcher fills it in, after the launcher's own validation."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # the launcher has no public way in

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_ray_up_refuses_nothing_in_cluster_yaml():
    config = validated(CLUSTER)
    head, gpu = config["available_node_types"][config["head_node_type"]], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0} and gpu["min_workers"] == 0
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "spot" in CLUSTER and sum("MarketType" in line for line in CLUSTER.splitlines()) == 1, "spot is one line"


def test_ray_up_refuses_nothing_in_the_file_for_hosts_of_ones_own():
    config = validated(HOSTS)
    assert [kind["max_workers"] for kind in config["available_node_types"].values()] == [2]


def test_ray_up_refuses_a_misspelt_field():
    with pytest.raises(Exception, match="idle_timeout"):
        validated(CLUSTER.replace("idle_timeout_minutes", "idle_timeout"))


@pytest.mark.parametrize("text", [CLUSTER, HOSTS], ids=["cluster.yaml", "hosts.yaml"])
def test_nodes_get_token_and_wheel_and_nothing_else_listens_to_the_world(text):
    config = yaml.safe_load(text)
    assert config["file_mounts"] == {"~/dist": "dist", "~/.ray/auth_token": "~/.ray/auth_token"}
    commands = "\n".join(config["setup_commands"] + config["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in commands and "--dashboard-host=127.0.0.1" in commands
    assert "--constraint ~/dist/versions.txt" in commands, "every node has the laptop's versions of Ray and torch"
    assert not re.search(r"(?i)(secret|access_key|password|BEGIN [A-Z ]*KEY|AKIA[0-9A-Z]{16})", str(config))


def test_the_rayjob_has_only_fields_that_kuberay_knows_and_begins_without_gpus():
    job = yaml.safe_load(RAYJOB)
    jsonschema.validate(job, RAYJOB_FIELDS)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] == 0 < group["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and cluster["authOptions"]["mode"] == "token"
    broken = copy.deepcopy(job)
    broken["spec"]["rayClusterSpec"]["autoscaling"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAYJOB_FIELDS)


def test_what_the_guide_submits_are_commands_and_sweeps_that_exist():
    import typer.main

    submitted = [RAYJOB, block("cluster commands")]
    known = cast(Any, typer.main.get_command(app)).commands["sweep"]
    options = {name for parameter in known.params for name in parameter.opts}
    for text in submitted:
        found = re.search(r"dfkd-ray sweep (.*)", text)
        assert found, text
        words = found[1].split()
        assert {word for word in words if word.startswith("--")} <= options
        assert sweep.parse(yaml.safe_load((REPOSITORY / "sweeps" / Path(words[0]).name).read_text()), words[0])


AWS = """
import sys, boto3
service, operation, *words = sys.argv[1:]
names = ["".join(part.capitalize() for part in word.strip("-").split("-")) for word in words[::2]]
getattr(boto3.client(service), operation.replace("-", "_"))(**dict(zip(names, words[1::2], strict=True)))
"""
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """Amazon's services, simulated by moto in a process of its own; `aws` on the PATH calls them."""
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-west-2"}
    for name, value in (known | {"HOME": str(tmp_path), "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}).items():
        monkeypatch.setenv(name, value)
    pipe, words = subprocess.PIPE, [sys.executable, "-c", SERVER]
    with subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.stdout.readline().strip())
        (tmp_path / ".ssh").mkdir()
        (tmp_path / "aws.py").write_text(AWS)
        (tmp_path / "aws").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/aws.py "$@"\n')
        (tmp_path / "aws").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        yield


def test_on_a_simulated_aws_the_launcher_starts_a_head_and_spot_machines_with_the_guides_profiles(aws):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    made = subprocess.run(
        ["bash", "-euc", block("aws roles").replace("BUCKET", "bucket")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    config = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(validated(CLUSTER)))
    kinds = config["available_node_types"]
    assert kinds["gpu"]["resources"]["GPU"] == 1 and kinds["head"]["resources"] == {"CPU": 0}
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "gpu"):
        tags = {"ray-node-name": kind, "ray-user-node-type": kind, "ray-node-type": "worker"}
        provider.create_node(kinds[kind]["node_config"], tags | {"ray-cluster-name": config["cluster_name"]}, 1)
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    machines = {one["InstanceType"]: one for reservation in reservations for one in reservation["Instances"]}
    head, gpu = machines[kinds["head"]["node_config"]["InstanceType"]], machines["g6.2xlarge"]
    assert gpu["InstanceLifecycle"] == "spot" and "InstanceLifecycle" not in head
    assert [one["IamInstanceProfile"]["Arn"].rpartition("/")[2] for one in (head, gpu)] == [
        "dfkd-ray-head",
        "dfkd-ray-worker",
    ]
    groups = boto3.client("ec2").describe_security_groups(GroupNames=["ray-autoscaler-dfkd-ray"])["SecurityGroups"]
    world = [rule for rule in groups[0]["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)], "only ssh listens to the world"
