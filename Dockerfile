# A server of one model with memory: mount its folder at /model (read-only is enough; the table is mapped, not loaded).
# The first stage has a compiler, for the part that reads rows fast.
FROM python:3.11 AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
COPY --from=build /wheels /wheels
RUN useradd --create-home server \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[serve]"
USER server
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"
# All addresses: the container's port is published by whoever runs it. SENSE_ENGRAM_API_KEY is the key to ask for.
ENTRYPOINT ["sense-engram", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
