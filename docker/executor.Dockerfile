# One executor rank on the CPU.
#
#   docker build --file docker/executor.Dockerfile --tag stepwire-executor .
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# Where pip looks; empty is its default. They stay in this stage, out of the image's history.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
# An index of torch builds, for example PyTorch's for CPUs; empty: the same as for the rest.
ARG TORCH_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off
RUN python -m venv /opt/stepwire
WORKDIR /src
# Dependencies in layers of their own, torch first: a change of the code fetches neither again.
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py executor > requirements.txt \
 && grep '^torch==' requirements.txt > torch.txt \
 && /opt/stepwire/bin/pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
    --requirement torch.txt
RUN /opt/stepwire/bin/pip install --requirement requirements.txt
COPY README.md LICENSE ./
COPY protos protos
COPY executor executor
# With the client: `stepwire pull` and `stepwire plan` need the executor's package beside it.
COPY client client
RUN /opt/stepwire/bin/pip install --no-deps .

FROM ${BASE_IMAGE}
# The kernels are compiled for the CPU that they run on, so the compiler belongs to the image.
RUN command -v g++ > /dev/null \
 || { apt-get update && apt-get install --yes --no-install-recommends g++ \
   && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /opt/stepwire /opt/stepwire
ENV PATH=/opt/stepwire/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    STEPWIRE_CACHE=/var/cache/stepwire
RUN install --directory --owner 10001 --group 10001 /var/cache/stepwire
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
# Compiles the kernels for the CPU that builds the image, where it can. A new volume over the cache
# starts with them; another CPU compiles its own when it first starts.
RUN python -c "import torch; from stepwire_executor.kernels import select_kernels; \
print('kernels:', select_kernels(torch.device('cpu')).name)"
VOLUME /var/cache/stepwire
WORKDIR /
EXPOSE 50061
ENTRYPOINT ["python", "-m", "stepwire_executor"]
