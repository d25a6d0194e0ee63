# The README's steps in an image:
#   docker build -t saliency-shards . && docker run --gpus all --ipc=host saliency-shards make demo
# --ipc=host: NCCL and the worker processes of data loaders need more than 64 MB of shared memory
FROM python:3.11-slim-bookworm

# g++ is for torch.compile
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /saliency-shards
COPY pyproject.toml requirements.txt README.md LICENSE Makefile saliency_shards.py ./
COPY schemas schemas
COPY precompute precompute
COPY pipeline pipeline
COPY train train
COPY bench bench
COPY examples examples
RUN make setup

CMD ["make", "help"]
