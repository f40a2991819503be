# megachiar with its commands.
#
#   docker build -t megachiar .
#   docker build -t megachiar:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg EXTRAS=gpu,fast .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" megachiar quickstart
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" --entrypoint torchrun megachiar:cuda \
#     --nproc_per_node 8 --module megachiar pretrain --config configs/400m.yaml
#
# BASE: any Debian or Ubuntu image; its own Python is used if it has one, 3.10 or newer.   EXTRAS: see pyproject.toml.
# PIP_OPTIONS: where pip is to look for another build of torch than the index's own, such as --extra-index-url or --find-links.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=cpu
ARG PIP_OPTIONS=""

# A compiler for Triton and training.compile; the base decides the versions of Debian's packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/megachiar
ENV PATH=/opt/megachiar/bin:$PATH HOME=/tmp

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY configs configs
COPY megachiar megachiar
# hadolint ignore=SC2086
RUN pip install --no-cache-dir -c constraints.txt ${PIP_OPTIONS} ".[${EXTRAS}]" && megachiar --version

WORKDIR /work
ENTRYPOINT ["megachiar"]
CMD ["--help"]
