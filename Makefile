# make dev     everything on this machine, with paste-ready connection strings
# make test    everything that proves something; what CI runs
.PHONY: dev test lint doc unit drivers fuzz fuzz-smoke deny bench bench-postgres tools help
.DEFAULT_GOAL := help

CARGO ?= cargo
FUZZ_SECONDS ?= 600
CHAOS_RUNS ?= 1000
MOVES ?= 20
TRANSITIONS ?= 200
NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The servers that dev and the tests start as children.
tools:
	@sh .ci/tools

dev: tools
	$(CARGO) build --release --bin dynabase
	exec target/release/dynabase dev $(ARGS)

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --no-deps --document-private-items

# Each step says how long it took. Built together with the tests: one set of features, dependencies compiled once.
step = @began=$$(date +%s); $(2) || exit 1; echo "== $(1): $$(($$(date +%s) - began)) s"

test:
	$(call step,tools,$(MAKE) --no-print-directory tools)
	$(call step,lint,$(MAKE) --no-print-directory lint)
	$(call step,build,$(CARGO) build --tests --bins)
	$(call step,tests,$(MAKE) --no-print-directory unit)
	$(call step,compose,tests/compose)
	$(call step,drivers,$(MAKE) --no-print-directory drivers)
	$(call step,documentation,$(MAKE) --no-print-directory doc)
	$(call step,fuzz,$(MAKE) --no-print-directory fuzz-smoke)

unit:
ifneq ($(NEXTEST),)
	$(CARGO) nextest run --no-fail-fast
	$(CARGO) test --doc
else
	$(CARGO) test --no-fail-fast
endif

# make drivers  the real drivers before dynabase, on this machine's PostgreSQL and on 18
drivers:
	DYNABASE_BIN="$$PWD/target/debug/dynabase" tests/drivers/run

# make fuzz    every fuzz target for FUZZ_SECONDS (600)
fuzz:
	SECONDS_EACH=$(FUZZ_SECONDS) fuzz/run

fuzz-smoke:
	SECONDS_EACH=20 fuzz/run

# make deny    licences, sources and banned crates; needs cargo-deny
deny:
	$(CARGO) deny check licenses bans sources

# make bench   the criterion benchmarks
bench:
	$(CARGO) bench

# make bench-postgres   direct, dynabase and PgBouncer side by side, into benches/RESULTS.md
bench-postgres:
	$(CARGO) build --release --bin dynabase
	python3 benches/postgres.py

# make bench-redis   direct, dynabase and twemproxy side by side
.PHONY: bench-redis
bench-redis:
	$(CARGO) build --release --bin dynabase
	python3 benches/redis.py

# make bench-http   SQL over HTTP and Convex, beside direct, HAProxy and pgbench
.PHONY: bench-http
bench-http:
	$(CARGO) build --release --bin dynabase
	python3 benches/http.py

# make bench-mongo   direct and through dynabase in both isolations; then how often a request asks for memory
.PHONY: bench-mongo bench-catalog
bench-mongo: tools
	$(CARGO) build --release --bin dynabase --example mongo_load
	python3 benches/mongo.py $(ARGS)
	$(CARGO) bench --bench mongo_allocations

# make bench-catalog   a million organisations: memory, start, cold look-up, from write to enforcement; some ten minutes
bench-catalog: tools
	$(CARGO) build --release --bin dynabase
	.cache/mongodb/bin/python benches/catalog.py $(ARGS)

# make chaos   CHAOS_RUNS (1000) tier transitions killed at random, every step of a life and a move killed once, MOVES (20) moves under writers, TRANSITIONS (200) under writers of all five databases, and the larger walks of the model; some 30 minutes
.PHONY: chaos
chaos: tools
	$(CARGO) test --lib transition::state -- --ignored --nocapture
	DYNABASE_CHAOS_RUNS=$(CHAOS_RUNS) $(CARGO) test --test integration transition::random_kills -- --nocapture
	DYNABASE_CHAOS_RUNS=$(CHAOS_RUNS) $(CARGO) test --test integration life::killed -- --nocapture
	DYNABASE_CHAOS_RUNS=$(MOVES) $(CARGO) test --test integration moving:: -- --nocapture
	DYNABASE_CHAOS_RUNS=$(MOVES) $(CARGO) test --test integration homes:: -- --nocapture --include-ignored
	DYNABASE_CHAOS_RUNS=$(TRANSITIONS) $(CARGO) test --test integration load:: -- --nocapture
