# One image for the services migrate, worker and flower, each with its own command.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY requirements.lock requirements-dev.lock ./
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
# The build backend of both packages is pinned too, and stays in this stage.
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
# A number, by which an orchestrator can verify that the user is not root.
USER 10001:10001
WORKDIR /tmp
CMD ["celery", "-A", "worker", "worker", "--loglevel", "INFO"]
