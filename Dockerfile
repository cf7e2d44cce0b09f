# syntax=docker/dockerfile:1
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
COPY config config
COPY benches benches
COPY tests tests
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin dynabase && cp target/release/dynabase /dynabase

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/dynabase --create-home dynabase
COPY --from=build /dynabase /usr/local/bin/dynabase
COPY config/dynabase.toml config/tiers.toml /etc/dynabase/
USER dynabase
VOLUME /var/lib/dynabase
EXPOSE 6432 6380 9900
HEALTHCHECK --interval=5s --timeout=2s --start-period=10s CMD curl -fsS http://127.0.0.1:9900/livez || exit 1
ENTRYPOINT ["dynabase"]
CMD ["serve", "--config", "/etc/dynabase/dynabase.toml"]
