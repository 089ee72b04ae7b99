# The image that launch/kubernetes/train.yaml names:
#   docker build -t registry.example.org/dist_train:latest .
# torch brings the CUDA libraries, the machine the driver. The base has the C compiler that
# torch.compile (norm.fused) needs.
FROM python:3.11-bookworm
WORKDIR /dist_train
# A layer of its own: it is by far the largest, and changes with constraints.txt alone.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md ./
COPY configs configs
COPY launch launch
COPY dist_train dist_train
RUN DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt -e '.[check,formats,remote,s3]'
