# What a person types. `make help` lists it.
#
# Certificates need Rust or Docker, the containers need Docker, the demo and the tests need Rust. Written for the make that macOS
# has (3.81) too.

.DEFAULT_GOAL := help

# The kiro command: by cargo where there is one, else in a container that sees this directory and no network (but for `check`, which
# looks at the host's ports).
ifneq ($(shell cargo --version 2>/dev/null),)
KIRO := cargo run --quiet --package kiro-cli --
else
KIRO := docker build --quiet --file docker/Dockerfile --target kiro-cli --tag kiro-cli . >/dev/null && \
	docker run --rm --network $(or $(KIRO_NETWORK),none) --user "$$(id -u):$$(id -g)" --volume "$$PWD:/mesh" --workdir /mesh kiro-cli
endif

DOCKER_ANSWERS := docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1

.PHONY: help certs check up down logs build demo bench bench-instructions bench-hostile chaos test test-rust test-compose conformance ci fmt clippy doc deny borders fuzz

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

certs: ## certificates for every service of docker/mesh/mesh.yaml; safe to run again
	@$(KIRO) certs

check: KIRO_NETWORK := host
check: ## what is wrong with mesh file, certificates and ports
	@$(KIRO) check

up: ## the mesh in containers, with Jaeger
	@$(DOCKER_ANSWERS) || { echo 'make up: Docker does not answer; `make demo` needs none' >&2; exit 1; }
	@test -f .env && test -f certs/ca/ca.pem || $(MAKE) --no-print-directory certs
	@docker compose up --detach --build --wait
	@set -a; . ./.env; set +a; \
	  echo "open http://localhost:$${KIRO_HTTP_PORT:-8080}/ and for traces http://localhost:$${KIRO_JAEGER_PORT:-16686}/"

down: ## ends what `make up` started
	@docker compose down --remove-orphans

logs: ## the logs of all containers, as they come
	@docker compose logs --follow --tail 50

build: ## the images
	@docker compose build

demo: ## the mesh in one process, without Docker
	@cargo run --release --quiet --package kiro-cli -- local

# Everything by default; ARGS='--quick' is a look, ARGS='--help' says what else there is.
bench: ## Kiro beside Envoy, HAProxy and nginx: 20 to 25 minutes; see docs/performance.md
	@cargo build --release --quiet --package kiro-proxy --package kiro-bench
	@$(or $(CARGO_TARGET_DIR),target)/release/kiro-bench $(ARGS)

# Repeats where time does not. ARGS=--accept keeps the new figures, ARGS='--cases get' counts one case. The sidecar is built with
# its symbols, for callgrind_annotate; who asks it need not be quick.
bench-instructions: ## instructions of a request, against those that are kept; needs valgrind, 5 minutes; see docs/performance
	@cargo build --profile profiling --quiet --package kiro-proxy
	@cargo build --quiet --package kiro-bench
	@$(or $(CARGO_TARGET_DIR),target)/debug/kiro-bench --instructions \
	  --kiro-proxy $(or $(CARGO_TARGET_DIR),target)/profiling/kiro-proxy $(ARGS)

# ARGS='--quick' is one round, ARGS='--attacks ping --doors inbound' a part.
bench-hostile: ## what hostile clients cost others, and in memory: 6 minutes; see docs/hostile-peers.md
	@cargo build --release --quiet --package kiro-proxy --package kiro-bench
	@$(or $(CARGO_TARGET_DIR),target)/release/kiro-bench --hostile $(ARGS)
# ARGS=--list names the experiments, ARGS='--only kill-proxy --seconds 5' makes one. Root crashes containers from the host.
chaos: ## breaks a mesh in containers, one thing at a time; needs Docker and root, 10 to 15 minutes; see docs/resilience.md
	@$(DOCKER_ANSWERS) || { echo 'make chaos: Docker does not answer' >&2; exit 1; }
	@cargo build --quiet --package kiro-cli
	@cargo build --release --quiet --package kiro-chaos
	@$(or $(CARGO_TARGET_DIR),target)/release/kiro-chaos --kiro $(or $(CARGO_TARGET_DIR),target)/debug/kiro $(ARGS)

test: test-rust test-compose ## everything: units, simulations, meshes in one process, and containers where Docker answers

test-rust:
	cargo test --workspace

# Skipped aloud on a machine without Docker; never in CI.
test-compose:
	@if $(DOCKER_ANSWERS); then \
	  docker/test; \
	elif [ "$$CI" = true ]; then \
	  echo 'make test: Docker does not answer, and CI needs it' >&2; exit 1; \
	else \
	  echo 'make test: SKIPPED the tests in containers: Docker does not answer'; \
	fi

# Minutes the first time, about two afterwards. KIRO_CONFORMANCE=all fails where a program is missing.
conformance: ## real clients (curl, gRPC, WebSocket, psql, redis-cli, a browser) through real sidecars
	@crates/kiro-conformance/prepare
	cargo test --package kiro-conformance -- --include-ignored

ci: fmt clippy doc deny borders fuzz test ## what CI runs; the tests are last, so that their sum ends the log

fmt:
	cargo fmt --all --check

clippy:
	cargo clippy --workspace --all-targets -- --deny warnings
	cargo clippy --package kiro-cli --no-default-features --all-targets -- --deny warnings
	cargo clippy --package kiro-cli --no-default-features --features sidecar --all-targets -- --deny warnings

doc:
	RUSTDOCFLAGS='--deny warnings' cargo doc --workspace --no-deps

# Advisories need a database from the network; what decides here is in this tree.
deny:
	cargo deny --workspace check bans licenses sources

borders: ## a border of crates is a border of trust
	@.ci/borders

# Each fuzz target is a workspace of its own, for a nightly compiler. CI sees that they build.
fuzz:
	@for manifest in crates/*/fuzz/Cargo.toml; do \
	  if [ ! -f "$$manifest" ]; then :; \
	  elif cargo +nightly --version >/dev/null 2>&1; then \
	    echo "cargo +nightly check --manifest-path $$manifest"; \
	    cargo +nightly check --manifest-path "$$manifest" || exit 1; \
	  elif [ "$$CI" = true ]; then \
	    echo "make fuzz: $$manifest needs a nightly compiler, and CI needs it" >&2; exit 1; \
	  else \
	    echo "make fuzz: SKIPPED $$manifest: no nightly compiler here"; \
	  fi; \
	done
