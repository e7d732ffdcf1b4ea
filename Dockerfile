# The image of conf/clusters/kuberay-*.yaml, for head, workers and submitter:
#   docker build -f conf/clusters/Dockerfile -t REGISTRY/dinov3-orchestrator:0.1.0 .
FROM python:3.11-slim
# KubeRay's probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home ray
WORKDIR /src
COPY requirements.lock requirements-dev.lock ./
RUN pip install --no-cache-dir --requirement requirements.lock
COPY . .
RUN pip install --no-cache-dir --constraint requirements-dev.lock ".[dashboard]"
USER 1000
WORKDIR /home/ray
