# Two images: `worker`, also for the service migrate, and `flower`.
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
# pip of the base image installs into an environment without pip.
RUN python -m venv --without-pip /venv
COPY requirements.lock requirements-dev.lock ./
RUN pip --python /venv install --no-cache-dir --require-hashes -r requirements.lock
# The build backend of both packages is pinned too, and stays in this stage.
RUN python -c "import re; print(re.search(r'^setuptools==(?:.*\\\\\n)+.*', open('requirements-dev.lock').read(), re.M)[0])" > build.lock \
    && pip install --no-cache-dir --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE celeryconfig.py ./
COPY client ./client
COPY worker ./worker
COPY tasks ./tasks
COPY storage ./storage
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels ./client . \
    && pip --python /venv install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM build AS build-flower
COPY requirements-flower.lock ./
RUN pip --python /venv install --no-cache-dir --require-hashes -r requirements-flower.lock

# The base image without what only builds and documentation need.
FROM python:${PYTHON} AS system
RUN pip uninstall --yes --quiet pip setuptools wheel \
    && rm -rf /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/idlelib /root/.cache \
        /usr/share/doc /usr/share/man /usr/share/locale /var/cache/* /var/lib/apt/lists/* /var/log/*

# Copied as one layer: deleted files of a lower layer would still be in the image.
FROM scratch AS base
COPY --from=system / /
ARG VERSION=0.1.0 REVISION=unknown
LABEL org.opencontainers.image.title="Interview Access Worker" \
    org.opencontainers.image.description="Celery workers that grant a user access to many interviews" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 PYTHONUNBUFFERED=1
# A number, by which an orchestrator can verify that the user is not root.
USER 10001:10001
WORKDIR /tmp

FROM base AS flower
COPY --from=build-flower /venv /venv
COPY flowerconfig.py /etc/flower/
ENV FLOWER_CONF=/etc/flower/flowerconfig.py
CMD ["celery", "-A", "worker", "flower", "--address=0.0.0.0", "--port=5555"]

# The last stage is the one that `docker build` builds by default.
FROM base AS worker
COPY --from=build /venv /venv
CMD ["celery", "-A", "worker", "worker", "--loglevel", "INFO", "--concurrency", "2"]
