"""Check that the KubeRay manifest fits KubeRay's API and runs a command that exists.

The schema holds the part of `ray.io/v1` that the manifest may use, with the types of KubeRay's
`rayjob_types.go` and `raycluster_types.go`. Any other field is refused, as by the API.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from precompute.__main__ import Options
from schemas.cli import parse

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "examples" / "kuberay.yaml"


def fields(required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9.]+([KMGTP]i?|m)?$"},
}


def lists(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = fields(
    "name image resources",
    name={"type": "string", "pattern": "^[a-z0-9-]+$"},
    image=TEXT,
    env=lists(fields("name value", name=TEXT, value=TEXT)),
    envFrom=lists(fields("secretRef", secretRef=fields("name", name=TEXT))),
    ports=lists(fields("containerPort name", containerPort=COUNT, name={**TEXT, "maxLength": 15})),
    resources=fields("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=lists(fields("name mountPath", name=TEXT, mountPath=TEXT)),
)
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers=lists(CONTAINER),
        tolerations=lists(fields("key operator effect", key=TEXT, operator=TEXT, effect=TEXT)),
        volumes=lists(
            fields("name emptyDir", name=TEXT, emptyDir=fields("", medium=TEXT, sizeLimit=TEXT))
        ),
    ),
)
SCHEMA = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        runtimeEnvYAML=TEXT,
        rayClusterSpec=fields(
            "rayVersion headGroupSpec workerGroupSpecs",
            rayVersion=TEXT,
            enableInTreeAutoscaling={"type": "boolean"},
            headGroupSpec=fields("template", rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=lists(
                fields(
                    "groupName replicas template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_has_the_fields_of_the_api(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, SCHEMA)
    wrong = {**manifest, "spec": {**manifest["spec"], "entryPoint": "x"}}
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(wrong, SCHEMA)


def test_what_refers_to_another_thing_finds_it(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    [worker] = cluster["workerGroupSpecs"]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], worker["template"]["spec"]):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    pinned = re.search(r"^ray==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]


def test_its_command_is_understood(manifest: dict[str, Any]) -> None:
    python, module, name, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, module, name) == (".venv/bin/python", "-m", "precompute")
    options = parse(Options, arguments)
    assert options.address == "auto"
    assert "WORKDIR /saliency-shards" in (ROOT / "Dockerfile").read_text()
