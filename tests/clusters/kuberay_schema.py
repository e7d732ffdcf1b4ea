"""JSON schemas of the part of Kubernetes and KubeRay that `conf/clusters/kuberay-*.yaml` use.

Written for this project from the public references: KubeRay's of `ray.io/v1` (RayClusterSpec, HeadGroupSpec,
WorkerGroupSpec, AutoscalerOptions, AuthOptions, RayJobSpec; KubeRay 1.6) and Kubernetes' of `core/v1` (PodSpec,
Container and what they hold). Of `ray.io/v1` the fields of each type are complete but for those that are only for
tests of KubeRay; of `core/v1` only what the files use is listed. Unknown names are refused, as
`kubectl apply --validate=strict` refuses them. It does not know whether an operator accepts the whole.
"""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}


def record(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """An object that has no other fields than these; a trailing underscore keeps a name from being a keyword."""
    properties = {name.rstrip("_"): schema for name, schema in fields.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


SECURITY = record(
    allowPrivilegeEscalation=BOOLEAN,
    capabilities=record(add=list_of(STRING), drop=list_of(STRING)),
    privileged=BOOLEAN,
    readOnlyRootFilesystem=BOOLEAN,
    runAsGroup=COUNT,
    runAsNonRoot=BOOLEAN,
    runAsUser=COUNT,
    seccompProfile=record(("type",), type=one_of("RuntimeDefault", "Unconfined", "Localhost")),
)
RESOURCES = record(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
ENV = record(
    ("name",),
    name=STRING,
    value=STRING,
    valueFrom=record(secretKeyRef=record(("name", "key"), name=STRING, key=STRING)),
)
MOUNT = record(
    ("name", "mountPath"), name=NAME, mountPath={"type": "string", "pattern": "^/"}, readOnly=BOOLEAN
)
CONTAINER = record(
    ("name", "image"),
    name=NAME,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=list_of(STRING),
    args=list_of(STRING),
    env=list_of(ENV),
    lifecycle=record(preStop=record(exec=record(("command",), command=list_of(STRING)))),
    ports=list_of(
        record(
            ("containerPort",),
            name={"type": "string", "pattern": "^[a-z0-9-]{1,15}$"},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
        )
    ),
    resources=RESOURCES,
    securityContext=SECURITY,
    volumeMounts=list_of(MOUNT),
)
EXPRESSION = record(
    ("key", "operator"),
    key=STRING,
    operator=one_of("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    values=list_of(STRING),
)
POD = record(
    ("containers",),
    affinity=record(
        nodeAffinity=record(
            requiredDuringSchedulingIgnoredDuringExecution=record(
                ("nodeSelectorTerms",),
                nodeSelectorTerms=list_of(record(matchExpressions=list_of(EXPRESSION))),
            )
        )
    ),
    automountServiceAccountToken=BOOLEAN,
    containers=list_of(CONTAINER),
    initContainers=list_of(CONTAINER),
    nodeSelector=STRINGS,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    securityContext=record(fsGroup=COUNT, runAsUser=COUNT, runAsNonRoot=BOOLEAN),
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    tolerations=list_of(
        record(
            key=STRING,
            operator=one_of("Equal", "Exists"),
            value=STRING,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            tolerationSeconds=COUNT,
        )
    ),
    volumes=list_of(
        record(("name",), name=NAME, emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY))
    ),
)
TEMPLATE = record(("spec",), metadata=record(labels=STRINGS, annotations=STRINGS), spec=POD)
HEAD = record(
    ("template",),
    template=TEMPLATE,
    headService={"type": "object"},
    enableIngress=BOOLEAN,
    labels=STRINGS,
    resources=STRINGS,
    rayStartParams=STRINGS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
)
WORKERS = record(
    ("groupName", "template"),
    suspend=BOOLEAN,
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    labels=STRINGS,
    resources=STRINGS,
    rayStartParams=STRINGS,
    template=TEMPLATE,
    scaleStrategy=record(workersToDelete=list_of(STRING)),
    numOfHosts=POSITIVE,
)
AUTOSCALER = record(
    resources=RESOURCES,
    image=STRING,
    imagePullPolicy=STRING,
    securityContext=SECURITY,
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=list_of(ENV),
    envFrom=list_of({"type": "object"}),
    volumeMounts=list_of(MOUNT),
)
CLUSTER = record(
    ("headGroupSpec",),
    suspend=BOOLEAN,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    authOptions=record(mode=one_of("disabled", "token"), secretName=NAME, enableK8sTokenAuth=BOOLEAN),
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=STRINGS,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions={"type": "object"},
    headGroupSpec=HEAD,
    rayVersion=STRING,
    workerGroupSpecs=list_of(WORKERS),
)
JOB = record(
    activeDeadlineSeconds=POSITIVE,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=TEMPLATE,
    metadata={"type": "object"},
    clusterSelector=STRINGS,
    submitterConfig=record(backoffLimit=COUNT),
    managedBy=STRING,
    deletionStrategy={"type": "object"},
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
)


def document(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The schema of one object of `ray.io/v1`."""
    metadata = record(("name",), name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS)
    return record(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


RAY_CLUSTER = document("RayCluster", CLUSTER)
RAY_JOB = document("RayJob", JOB)
