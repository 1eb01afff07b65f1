# The picker alone, for the args of an existing manifest. No compiler in the final stage, no root, nothing written:
# runs with readOnlyRootFilesystem. tests/packaging walks these steps where there is no container builder.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY epp epp
RUN python -m venv /opt/epp
RUN /opt/epp/bin/pip install --no-cache-dir --constraint requirements.lock .

FROM python:3.11-slim
COPY --from=build /opt/epp /opt/epp
ENV PATH=/opt/epp/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
# ext_proc, health, metrics
EXPOSE 9002 9003 9090
ENTRYPOINT ["epp", "serve"]
