# One image for the head, the workers and whoever submits a run (conf/clusters/kuberay-*.yaml), built from the wheel:
#   docker build --tag REGISTRY/dinov3-orchestrator:0.2.0 .
# For NVIDIA GPUs, with the libraries that torch brings along:
#   docker build --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --tag REGISTRY/dinov3-orchestrator:0.2.0-cuda .
# BASE is any Debian or Ubuntu whose Python is 3.11 or newer. TORCH_INDEX is a package index with the build of torch
# that you want, say the one without CUDA, which is gigabytes smaller; without it pip takes its usual one.
ARG BASE=debian:12-slim

FROM ${BASE} AS python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

FROM python AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# What the lock file names, in a layer that a change of the project's code leaves alone. The lock leaves open which
# build of torch is used and what that build needs, so torch is installed first, with its dependencies.
FROM python AS environment
ARG TORCH_INDEX=
COPY requirements.lock requirements-dev.lock /locks/
# PIP_CONSTRAINT holds for the builds of source distributions, too. It names the lock for tests, where the dashboard's
# packages stand as well; both locks agree on what is in both.
ENV PIP_CONSTRAINT=/locks/requirements-dev.lock
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        "$(grep --only-matching '^torch==[^ ;]*' /locks/requirements.lock)" \
    && pip install --no-cache-dir --no-deps --requirement /locks/requirements.lock
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[dashboard]"

FROM python
# KubeRay's probes call wget. Some bases have a user 1000 already.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* \
    && if getent passwd 1000; then userdel --remove "$(id --name --user 1000)"; fi \
    && useradd --uid 1000 --create-home ray
COPY --from=environment /opt/venv /opt/venv
USER 1000
WORKDIR /home/ray
CMD ["orchestrator", "--help"]
