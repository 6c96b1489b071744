# The pipeline in a container, for Prefect's Docker and Kubernetes work pools (docs/scaling.md):
#   docker build -t qadapter-pipeline .
#   docker build -t qadapter-pipeline --build-arg EXTRAS=quantized --build-arg BASE=<an image with CUDA and Python 3.11> .
# Not built by its authors: there was no Docker where this was written.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    TOKENIZERS_PARALLELISM=false \
    QADAPTER_HOME=/work

WORKDIR /opt/qadapter

# What changes seldom comes first: with these files alone the libraries are a layer of their own. Each is checked against
# its hash; packages that come as source are built by the setuptools checked before them (docs/security.md).
COPY requirements.lock requirements-build.lock ./
RUN python -m pip install --require-hashes -r requirements-build.lock \
    && python -m pip install --require-hashes --no-build-isolation -r requirements.lock

# requirements.lock has the extras `pipeline` and `quantized`; others (dask, ray) come by version.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY installing installing
RUN mkdir qadapter tasks flows && touch qadapter/__init__.py tasks/__init__.py flows/__init__.py \
    && python -m pip install --no-build-isolation -c constraints.txt -e ".[pipeline${EXTRAS:+,$EXTRAS}]"

COPY prefect.toml prefect.yaml ./
COPY configs configs
COPY qadapter qadapter
COPY tasks tasks
COPY flows flows

# A user of its own: a run needs to write to /work and to its home, and to nothing else.
RUN useradd --create-home --uid 1000 qadapter && mkdir /work && chown 1000:1000 /work
USER 1000
ENV PREFECT_HOME=/home/qadapter/.prefect
VOLUME /work

CMD ["python", "-m", "qadapter", "run", "--profile", "smoke"]
