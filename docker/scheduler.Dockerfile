# The scheduler and the command line: no torch, no numpy, no compiler.
#
#   docker build --file docker/scheduler.Dockerfile --tag stepwire-scheduler .
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# Where pip looks; empty is its default. They stay in this stage, out of the image's history.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off
RUN python -m venv /opt/stepwire
WORKDIR /src
# Dependencies in a layer of their own: a change of the code does not fetch them again.
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py certs > requirements.txt \
 && /opt/stepwire/bin/pip install --requirement requirements.txt
COPY README.md LICENSE ./
COPY protos protos
COPY scheduler scheduler
COPY client client
RUN /opt/stepwire/bin/pip install --no-deps . \
 && /opt/stepwire/bin/pip uninstall --yes pip setuptools

FROM ${BASE_IMAGE}
COPY --from=build /opt/stepwire /opt/stepwire
ENV PATH=/opt/stepwire/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Where docker-compose.yml keeps certificates.
RUN install --directory --owner 10001 --group 10001 --mode 700 /certificates
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /
EXPOSE 50051
ENTRYPOINT ["python", "-m", "stepwire_scheduler"]
