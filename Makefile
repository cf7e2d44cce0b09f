# make dev     everything on this machine, with paste-ready connection strings
# make test    everything that proves something; what CI runs
.PHONY: dev test lint doc fuzz fuzz-smoke bench bench-postgres tools help
.DEFAULT_GOAL := help

CARGO ?= cargo
FUZZ_SECONDS ?= 600
FUZZ_TARGETS := $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
FUZZER := $(shell command -v cargo-fuzz 2>/dev/null)

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
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items

test: tools lint
ifneq ($(NEXTEST),)
	$(CARGO) nextest run
	$(CARGO) test --doc
else
	$(CARGO) test
endif
	@if [ -x tests/compose ]; then tests/compose; fi
	@if [ -x tests/drivers/run ]; then tests/drivers/run; fi
	$(MAKE) doc
	$(MAKE) fuzz-smoke

# make fuzz    every fuzz target for FUZZ_SECONDS (600)
fuzz:
	@for target in $(FUZZ_TARGETS); do \
		echo "fuzz $$target"; \
		$(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

# Only where cargo-fuzz and a nightly compiler are there.
fuzz-smoke:
ifneq ($(FUZZER),)
	@if rustup toolchain list 2>/dev/null | grep -q nightly; then \
		$(MAKE) fuzz FUZZ_SECONDS=20; \
	else echo "fuzz: skipped, no nightly compiler (rustup toolchain install nightly)"; fi
else
	@echo "fuzz: skipped, no cargo-fuzz (cargo install cargo-fuzz)"
endif

# make bench   the criterion benchmarks
bench:
	$(CARGO) bench

# make bench-postgres   direct, dynabase and PgBouncer side by side, into benches/RESULTS.md
bench-postgres:
	$(CARGO) build --release --bin dynabase
	sh benches/postgres.sh

# make bench-redis   direct, dynabase and twemproxy side by side
.PHONY: bench-redis
bench-redis:
	$(CARGO) build --release --bin dynabase
	python3 benches/redis.py
