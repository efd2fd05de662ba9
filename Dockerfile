# Three images: train (CUDA), serve-gpu (CUDA, TensorRT) and serve-cpu; neither of the last two has PyTorch. docs/gpu.md
#   docker build --target serve-cpu -t ffl-serve-cpu .
#   docker run --read-only --tmpfs /tmp -v "$PWD/bundles:/bundles:ro" -p 7860:7860 ffl-serve-cpu /bundles/fused
# CUDA comes with the Python packages, the driver with NVIDIA's container toolkit (--gpus all): no base image of CUDA.
# 3.11 is what constraints.txt was tested with.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --quiet --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
# What is written at run time: temporary files below /tmp, and what can be made again below /cache (verdicts, engines).
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/cache
RUN useradd --system --uid 10001 --no-create-home --home-dir /tmp ffl \
    && install --directory --owner=10001 --mode=0700 /cache \
    && install --directory --owner=10001 /work
COPY constraints.txt constraints-gpu.txt /
COPY --from=wheel /wheels /wheels

FROM base AS train
RUN python -m pip install --quiet -c /constraints.txt -c /constraints-gpu.txt "$(ls /wheels/*.whl)[export,predict,gpu]"
USER 10001
WORKDIR /work
VOLUME ["/cache", "/work"]
CMD ["ffl-train", "--help"]

FROM base AS serve-gpu
RUN python -m pip install --quiet -c /constraints.txt -c /constraints-gpu.txt "$(ls /wheels/*.whl)[serve,gpu,tensorrt]"
USER 10001
WORKDIR /work
VOLUME ["/cache"]
EXPOSE 7860
# A new engine takes minutes before the first start is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/v2/health/ready', timeout=4)"]
ENTRYPOINT ["ffl-serve", "--host", "0.0.0.0", "--port", "7860", "--runtime", "tensorrt"]

FROM base AS serve-cpu
RUN python -m pip install --quiet -c /constraints.txt "$(ls /wheels/*.whl)[serve,cpu,openvino]"
USER 10001
WORKDIR /work
VOLUME ["/cache"]
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/v2/health/ready', timeout=4)"]
ENTRYPOINT ["ffl-serve", "--host", "0.0.0.0", "--port", "7860"]
