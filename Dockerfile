# mfm-lightning, its lock and its tests. CUDA's libraries come with torch: the host needs its driver and container toolkit alone.
#   docker build -t mfm-lightning .                          docker run --gpus all --rm -v "$PWD:/work" mfm-lightning COMMAND
#   docker build -t mfm-lightning:cpu --build-arg CPU=1 .    docker run --rm -v "$PWD:/work" mfm-lightning:cpu COMMAND
FROM python:3.12-slim-bookworm

# make sets up and tests; git names the commit of a run; g++ is for torch.compile
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make git g++ \
    && rm -rf /var/lib/apt/lists/*

ARG CPU=
WORKDIR /opt/mfm-lightning
# the packages are a layer of their own: a change of the code does not install them again
COPY Makefile requirements.lock ./
RUN make packages CPU="$CPU" PIP_OPTIONS=--no-cache-dir
COPY . .
RUN make setup CPU="$CPU"

ENV PATH="/opt/mfm-lightning/.venv/bin:$PATH"
WORKDIR /work
ENTRYPOINT ["mfm"]
CMD ["--help"]
