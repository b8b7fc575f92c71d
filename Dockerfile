# Built once for migrate, worker and flower; each names its own command.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY requirements.lock requirements-dev.lock ./
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
# What builds our two packages is pinned too, and left behind in this stage.
RUN python -c "import re; print(re.search(r'^setuptools==(?:.*\\\\\n)+.*', open('requirements-dev.lock').read(), re.M)[0])" > build.lock \
    && pip install --no-cache-dir --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE celeryconfig.py ./
COPY client ./client
COPY worker ./worker
COPY tasks ./tasks
COPY storage ./storage
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels ./client . \
    && /venv/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /tmp
CMD ["celery", "-A", "worker", "worker", "--loglevel", "INFO"]
