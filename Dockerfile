# An image with everything for training and testing, at the versions of requirements.lock:
#   docker build -t dgunet .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/Datasets:/dgunet/Datasets" -v "$PWD/checkpoints:/dgunet/checkpoints" \
#       dgunet python Deraining/train.py
FROM python:3.12-slim
# Triton, with which torch.compile makes kernels for a GPU, calls a C compiler. CUDA's libraries come with PyTorch.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:0.9 /uv /usr/local/bin/uv
WORKDIR /dgunet
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_LINK_MODE=copy
COPY requirements.lock .
RUN --mount=type=cache,target=/root/.cache/uv uv venv $VIRTUAL_ENV && uv pip sync requirements.lock
COPY . .
RUN uv pip install --no-deps --editable .
CMD ["dgunet", "list"]
