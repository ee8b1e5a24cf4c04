# Quill's image: starts the server; `--entrypoint python3 quill -m training …` runs the trainer.
#
#   docker build -t quill .
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp:exec quill
#
# BASE_IMAGE needs python3 (3.11 or newer) with venv; a compiler is added where it has none. pip takes torch's default
# build, which carries CUDA; for a smaller CPU-only image, pass the address of PyTorch's CPU wheels (see its
# installation page) as PIP_EXTRA_INDEX_URL.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# The compiler belongs to the final image too: Inductor and Triton compile kernels at run time.
RUN command -v g++ >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*)

FROM base AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
# The dependencies come before the sources, so that a change of code rebuilds only the last small layer.
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/quill \
    && python3 -c "import tomllib; t = tomllib.load(open('pyproject.toml', 'rb')); print(*t['build-system']['requires'], *t['project']['dependencies'], sep='\n')" > requirements.txt \
    && /opt/quill/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY . .
RUN /opt/quill/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && cp -r training/configs /opt/quill/recipes

FROM base
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin quill \
    && mkdir /models /data && chown quill:quill /models /data \
    && ln -s /opt/quill/recipes /recipes
COPY --from=build /opt/quill /opt/quill
# Everything that writes goes to /tmp, so that the root may be read-only. /tmp must allow execution (`exec` for a
# tmpfs): compiled kernels are loaded from there.
ENV PATH=/opt/quill/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    CUDA_CACHE_PATH=/tmp/cache/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    QUILL_HOST=0.0.0.0 \
    QUILL_PORT=8000
VOLUME ["/models", "/data"]
EXPOSE 8000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['QUILL_PORT'] + '/ready', timeout=4)"]
ENTRYPOINT ["python3", "-m", "server"]
