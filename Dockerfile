# Mixer Serve as a container. The context is the repository.
#
#   docker build -t mixer-serve:gpu .                 CUDA 13 (the default target)
#   docker build -t mixer-serve:cpu --target cpu .    no GPU needed
#
# Any Debian-like base will do, with Python >= 3.11 or with apt to get it.
ARG BASE=debian:13.7-slim

# --- Python, and nothing else: what every stage stands on ---------------------------------------
FROM ${BASE} AS python
# The base's own Python if it has one. Its version is not pinned: the base is, and a rebuild is to
# bring Debian's security fixes.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt/* /var/log/dpkg.log; \
    fi

# --- the tools that build; none of them reaches an image ----------------------------------------
FROM python AS build
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY docker/build.lock /src/docker/
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes -r /src/docker/build.lock \
    && python3 -m venv --without-pip /opt/mixer

# The packages, in a layer of their own: it changes with a lock, not with the code.
FROM build AS cpu-packages
COPY docker/cpu.lock /src/docker/
RUN /build/bin/pip --python /opt/mixer/bin/python install --no-cache-dir --require-hashes \
        -r /src/docker/cpu.lock \
    && find /opt/mixer/lib -type d -name tests -prune -exec rm -r {} +

FROM build AS gpu-packages
COPY docker/gpu.lock /src/docker/
RUN /build/bin/pip --python /opt/mixer/bin/python install --no-cache-dir --require-hashes \
        -r /src/docker/gpu.lock \
    && find /opt/mixer/lib -type d -name tests -prune -exec rm -r {} +

# Mixer Serve itself, without model_export: that needs torch.
FROM build AS code
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir . . \
    && /build/bin/pip --python /opt/mixer/bin/python install --no-cache-dir --no-deps ./*.whl \
    && install -m 644 app/models/mixer-cifar10.onnx model.onnx \
    && find /opt/mixer/bin -name 'mixer-*' ! -name mixer-serve -delete
# Readable for whomever the image runs as, also from a checkout that is its owner's alone.
COPY --chmod=644 docker/healthcheck.py /opt/mixer/

# --- how both images run ------------------------------------------------------------------------
FROM python AS serve
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Mixer Serve" \
      org.opencontainers.image.description="Classifies images with a trained MLP-Mixer over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# onnxruntime's Linux builds report their use over the network unless told not to.
ENV PATH=/opt/mixer/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    MIXER_HOST=0.0.0.0 \
    MIXER_PORT=8000 \
    MIXER_MODEL=/models/model.onnx
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python3", "/opt/mixer/healthcheck.py"]
CMD ["mixer-serve"]

FROM serve AS cpu
COPY --from=cpu-packages /opt/mixer /opt/mixer
COPY --from=code /opt/mixer /opt/mixer
COPY --from=code /src/model.onnx /models/model.onnx
ENV MIXER_DEVICE=cpu

FROM serve AS gpu
COPY --from=gpu-packages /opt/mixer /opt/mixer
COPY --from=code /opt/mixer /opt/mixer
COPY --from=code /src/model.onnx /models/model.onnx
LABEL org.opencontainers.image.licenses="Apache-2.0 AND LicenseRef-NVIDIA"
ENV MIXER_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
