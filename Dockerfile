# Images that train and run models: `cpu`, and `cuda` for NVIDIA GPUs. See docs/containers.md.
#   docker build --target cpu --build-arg TORCH_INDEX=… -t zeroi2v .
#   docker build --target cuda -t zeroi2v:cuda .
FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /zeroi2v
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH

FROM base AS cpu
# torch comes first and alone; TORCH_INDEX is PyTorch's own index of builds for CPUs, which are small.
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY zeroi2v zeroi2v
COPY train train
COPY examples examples
RUN pip install -c constraints.txt -e '.[train,export,serve]'
ENTRYPOINT ["zeroi2v"]
CMD ["doctor"]

FROM base AS cuda
# Triton compiles its launchers with the system's compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
COPY constraints.txt ./
RUN pip install "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY zeroi2v zeroi2v
COPY train train
COPY examples examples
RUN pip install -c constraints.txt -e '.[train,export,serve]' "$(grep '^triton==' constraints.txt)"
ENTRYPOINT ["zeroi2v"]
CMD ["doctor"]
