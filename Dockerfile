# syntax=docker/dockerfile:1
# The server on a CPU (the default target) or on an NVIDIA GPU (--target cuda): see docs/containers.md.

FROM ghcr.io/astral-sh/uv:0.13.9 AS uv

FROM python:3.11-slim-trixie AS python
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1


FROM python AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    UV_PROJECT_ENVIRONMENT=/opt/venv \
    VIRTUAL_ENV=/opt/venv
WORKDIR /build


FROM build AS dependencies-cuda
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/build/uv.lock \
    uv sync --locked --no-dev --no-install-project


# The locked torch is PyPI's, and that needs CUDA's libraries. Here it is the same version from PyTorch's own index, made
# for CPUs: everything else comes from the lock with its hashes, less what only CUDA is for.
FROM build AS dependencies-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/build/uv.lock \
    uv export --quiet --locked --no-dev --no-emit-project --output-file /tmp/locked.txt \
        --no-emit-package torch --no-emit-package torchvision \
        --prune cuda-bindings --prune cuda-toolkit --prune triton --prune nvidia-cudnn-cu13 \
        --prune nvidia-cusparselt-cu13 --prune nvidia-nccl-cu13 --prune nvidia-nvshmem-cu13 \
    && uv export --quiet --locked --no-dev --no-emit-project --output-file /tmp/torch.txt --no-hashes \
        --only-emit-package torch --only-emit-package torchvision \
    && uv venv /opt/venv \
    && uv pip install --no-deps --require-hashes --requirement /tmp/locked.txt \
    && uv pip install --no-deps --default-index "$TORCH_INDEX" --requirement /tmp/torch.txt \
    && uv pip check


# The project alone, laid out as it goes into the environment: a change of the sources is a small layer on a large one.
FROM build AS project
COPY pyproject.toml README.md LICENSE ./
COPY mlx_embeddings_server mlx_embeddings_server
COPY backends backends
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && uv pip install --no-deps --prefix /opt/project .


FROM python AS runtime
# A model to be part of the image; ADAPTERS are NAME=ID, with commas between them. Its files are not the server's to
# change, and no volume over /data hides them. Where there is none, models are downloaded to /data.
ARG MODEL=""
ARG PRETRAINED=""
ARG ADAPTERS=""
ARG REVISION=""
ENV HF_HOME=${MODEL:+/opt/models}
# hadolint ignore=DL3064
ENV HF_HOME=${HF_HOME:-/data} \
    TIKTOKEN_CACHE_DIR=/data/tiktoken \
    MLX_EMBEDDINGS_MODEL=$MODEL \
    MLX_EMBEDDINGS_PRETRAINED=$PRETRAINED \
    MLX_EMBEDDINGS_ADAPTER=$ADAPTERS \
    MLX_EMBEDDINGS_REVISION=$REVISION \
    MLX_EMBEDDINGS_HOST=0.0.0.0 \
    MLX_EMBEDDINGS_PORT=8888
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin server \
    && install --directory --owner server --group server /data
WORKDIR /data
EXPOSE 8888
STOPSIGNAL SIGTERM
# Loading, and the download before it, may take long: what fails meanwhile does not count.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m --start-interval=5s --retries=3 \
    CMD ["python", "-IS", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('MLX_EMBEDDINGS_PORT') or 8888), timeout=4); server.request('GET', '/health'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["mlx-embeddings-server"]


FROM runtime AS cuda
COPY --from=dependencies-cuda /opt/venv /opt/venv
COPY --from=project /opt/project /opt/venv
RUN --mount=type=bind,source=scripts/preload_model.py,target=/tmp/preload_model.py \
    --mount=type=secret,id=HF_TOKEN \
    HF_TOKEN_PATH=/run/secrets/HF_TOKEN python /tmp/preload_model.py \
    && chmod -R a+rX "$HF_HOME"
ENV HF_HUB_OFFLINE=${MLX_EMBEDDINGS_MODEL:+1} \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001


FROM runtime AS cpu
COPY --from=dependencies-cpu /opt/venv /opt/venv
COPY --from=project /opt/project /opt/venv
RUN --mount=type=bind,source=scripts/preload_model.py,target=/tmp/preload_model.py \
    --mount=type=secret,id=HF_TOKEN \
    HF_TOKEN_PATH=/run/secrets/HF_TOKEN python /tmp/preload_model.py \
    && chmod -R a+rX "$HF_HOME"
ENV HF_HUB_OFFLINE=${MLX_EMBEDDINGS_MODEL:+1}
USER 10001:10001
