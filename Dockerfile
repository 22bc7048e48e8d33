# One static binary on a base without shell or package manager, for the platform that it is built on or that
# `docker buildx build --platform` names: nothing here depends on it. To pin a base to the byte, give it with its digest:
#   docker build --build-arg BASE=gcr.io/distroless/static-debian12:nonroot@sha256:… .
ARG RUST=rust:1.95.0-slim-bookworm
ARG BASE=gcr.io/distroless/static-debian12:nonroot

FROM ${RUST} AS build
WORKDIR /build
# With a target that is named, the flags are for the program alone, not for build scripts and macros.
RUN rustc -vV | sed -n 's/^host: //p' > target-triple
ENV RUSTFLAGS="-C target-feature=+crt-static"

# The dependencies, in a layer of their own: only Cargo.toml and Cargo.lock rebuild it.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src tests/it benches \
 && echo 'fn main() {}' | tee src/main.rs benches/hot.rs benches/instructions.rs benches/proxy.rs > tests/it/main.rs \
 && touch src/lib.rs \
 && cargo build --release --locked --target "$(cat target-triple)"

# Files of the context may be older than what was just built, and cargo goes by their times.
COPY src src
RUN touch src/main.rs src/lib.rs \
 && cargo build --release --locked --target "$(cat target-triple)" \
 && mkdir -p /image/bin /image/volumes/ca /image/volumes/certs /image/volumes/state \
 && chmod 700 /image/volumes/ca \
 && cp "target/$(cat target-triple)/release/token-sidecar" /image/bin/

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="token-sidecar" \
      org.opencontainers.image.description="A forward HTTP proxy that keeps the shop's API token fresh for unchanged parsers" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="gcr.io/distroless/static-debian12:nonroot"
COPY --from=build /image/bin/ /usr/local/bin/
# New volumes take over these owners and modes.
COPY --from=build --chown=65532:65532 /image/volumes/ /
ENV PROXY_LISTEN=0.0.0.0:8080 \
    ADVERTISE_URL=http://token-sidecar:8080 \
    CA_DIR=/ca \
    TRUST_DIR=/certs \
    ENV_FILE=/state/token.env
VOLUME ["/ca", "/certs", "/state"]
EXPOSE 8080
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["token-sidecar", "healthcheck"]
ENTRYPOINT ["token-sidecar"]
CMD ["run"]
