# Images of teasr. docs/docker.md says how they are built and used.
#   docker build --target restore -t teasr .                                                    CPU
#   docker build --target train --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 -t teasr-train .   NVIDIA GPU
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS base
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/teasr
ENV PATH=/opt/teasr/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /src
COPY constraints.txt setup.py pyproject.toml MANIFEST.in README.md ./
COPY teasr teasr
COPY launch launch
COPY data_prep data_prep
COPY eval eval
COPY ds_configs ds_configs

# Restores pictures: `upscale`, and the web page of `demo`.
FROM base AS restore
RUN pip install --no-cache-dir -c constraints.txt '.[demo]'
RUN useradd --create-home teasr && mkdir /data && chown teasr /data
USER teasr
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["teasr"]
CMD ["--help"]

# Prepares data, trains and evaluates; with all programs of the repository in /src. DeepSpeed compiles its kernels for
# offloading when a run needs them.
FROM base AS train
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ ninja-build python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir -c constraints.txt setuptools wheel \
    && pip install --no-cache-dir -c constraints.txt '.[train,demo,jpeg,nf4]'
RUN useradd --create-home teasr && mkdir /data && chown teasr /data
USER teasr
WORKDIR /data
ENTRYPOINT ["teasr"]
CMD ["--help"]
