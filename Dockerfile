# compress on a CPU:
#   docker build -t compress .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" compress run
# torch's ordinary wheels bring CUDA along. An index of wheels without it makes the image small:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=URL -t compress .
# Nothing has built or run this file so far.
FROM python:3.12-slim-bookworm AS wheel
RUN pip install --no-cache-dir build
COPY . /source
RUN python -m build --wheel --outdir /dist /source

FROM python:3.12-slim-bookworm
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir /dist/*.whl
RUN useradd --create-home compress && install -d -o compress /work
USER compress
# Any number of a user may be given at the start; what is cached needs a home and a name.
ENV HOME=/tmp LOGNAME=compress
WORKDIR /work
ENTRYPOINT ["compress"]
CMD ["--help"]
