# check=skip=SecretsUsedInArgOrEnv
# `steermoe serve` on CPUs, with the default model inside: `make dist`, then `docker build -t steermoe .` (docs/serve.md).

FROM python:3.11-slim-bookworm AS build
COPY constraints.txt dist/*.whl /dist/
# torch comes from its index of CPU builds: PyPI's for Linux brings CUDA along.
RUN python -m venv /opt/steermoe \
    && /opt/steermoe/bin/pip install --no-cache-dir --constraint /dist/constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch \
    && for wheel in /dist/steermoe-*.whl; do \
        /opt/steermoe/bin/pip install --no-cache-dir --constraint /dist/constraints.txt "${wheel}[serve]" || exit 1; \
    done

FROM python:3.11-slim-bookworm
# Models and vectors that are made later are kept in /data, which `docker run -v` can keep.
ENV PATH=/opt/steermoe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STEERMOE_CACHE=/data/cache \
    XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface
RUN useradd --no-log-init --create-home --uid 10001 steermoe \
    && install --directory --owner steermoe --group steermoe /data
COPY --from=build /opt/steermoe /opt/steermoe
USER 10001
WORKDIR /home/steermoe
RUN steermoe models pull
VOLUME /data

# No secret: an empty key is refused at the start, so nobody serves without one by accident.
# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 \
    STEERMOE_API_KEY=
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --timeout=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["steermoe", "serve", "--host", "0.0.0.0", "--port", "8000"]
