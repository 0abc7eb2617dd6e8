# boxlite-cri: build, show, test, measure. Every target may be run again; what is there already is not made twice.
#
# PROFILE: demo, tests and bench run `dev` (own code without optimisation for quick builds, dependencies optimised: they
# move the bytes); for a node: make build PROFILE=release && make install PROFILE=release. The agent is static and
# stripped, since its size is what every VM boots.

CACHE      ?= $(HOME)/.cache/boxlite-cri
PREFIX     ?= /usr/local
TARGET     ?= $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
TRIPLE     := x86_64-unknown-linux-gnu
PROFILE    ?= dev
OUT        := $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
GUEST      := $(TARGET)/$(TRIPLE)/agent-$(OUT)/boxlite-guest
BIN        := $(TARGET)/$(OUT)

export BOXLITE_CACHE := $(CACHE)
export BOXLITE_GUEST := $(GUEST)
export BOXLITE_BIN   := $(BIN)
export CARGO_TARGET_DIR := $(TARGET)
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: all tools build guest host demo test test-containerd e2e-qemu e2e-krun conformance conformance-krun conformance-containerd bench lint unit fmt install clean help
all: build

help:
	@echo "make demo     install what is needed, build, and show a pod in a real VM from pull to removal"
	@echo "make test     lints, unit tests, end-to-end tests on QEMU and on libkrun (about 45 minutes on two cores)"
	@echo "make conformance   critest, the conformance suite of CRI runtimes: SPDY, WebSocket, NRI (docs/conformance.md)"
	@echo "make test-containerd  the shim under containerd 1.6 and 2.x;  make conformance-containerd  critest against its CRI plugin"
	@echo "make bench    ratios against a bare boot of the same VMM and kernel"
	@echo "make build    programs into $(TARGET);  make install PREFIX=/usr/local puts them in place"
	@echo "make tools    Debian packages, the guest kernel, virtiofsd and vhost-device-vsock"

tools:
	@e2e/scripts/tools

host: tools
	cargo build --locked --profile $(PROFILE) -p boxlite-cri -p boxlite-shim-v2 -p boxlite-e2e

# Static, in the same target directory: what runs at build time is shared with the host's build. Every VM boots from it,
# so without symbols.
guest: tools
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile $(PROFILE) -p boxlite-guest --target $(TRIPLE)
	mkdir -p $(dir $(GUEST))
	strip -o $(GUEST).new $(TARGET)/$(TRIPLE)/$(OUT)/boxlite-guest
	cmp -s $(GUEST).new $(GUEST) || mv $(GUEST).new $(GUEST)

build: host guest

demo: build
	@$(BIN)/boxlite-e2e demo

# Everything, with one count for each home and a last line "N passed, N failed, N skipped".
test: build
	@e2e/scripts/test-all

# One home alone: make e2e-qemu FILTER=logs
e2e-qemu: build
	@$(BIN)/boxlite-e2e test --home qemu $(if $(FILTER),--filter $(FILTER))

e2e-krun: build
	@e2e/kvmhost/run -- $(BIN)/boxlite-e2e test --home krun $(if $(FILTER),--filter $(FILTER))

# critest on QEMU, three times. One run, some specs: make conformance CRITEST="--transport spdy --focus Networking"
conformance: build
	@e2e/scripts/critest >/dev/null
	@$(BIN)/boxlite-e2e conformance --home qemu $(CRITEST)

# The same in the emulated KVM host, where everything takes several times as long: once, with NRI and SPDY.
conformance-krun: build
	@e2e/scripts/critest >/dev/null
	@e2e/kvmhost/run --timeout 14400 -- $(BIN)/boxlite-e2e conformance --home krun $(or $(CRITEST),--transport nri)

# The shim under stock containerds, 1.6 and 2.x, with no boxlite-cri: on QEMU here, on libkrun with `make test-containerd
# VMM=krun` in the emulated KVM host. VERSION=1.6 or 2 for one of them; 1.7 or 2.3 for one that is built from source first. An
# upgrade goes to 2.x.
test-containerd: build
	@e2e/scripts/containerd $(if $(VERSION),$(sort $(VERSION) 2))
	@$(if $(filter krun,$(VMM)),e2e/kvmhost/run --timeout 3000 --) $(BIN)/boxlite-e2e containerd --home $(or $(VMM),qemu) \
	  $(if $(VERSION),--version $(VERSION)) $(if $(FILTER),--filter $(FILTER))

# critest against a stock containerd whose handler is the shim, on QEMU, SPDY and NRI. VERSION=1.6 for that one, which has no NRI.
conformance-containerd: build
	@e2e/scripts/critest >/dev/null
	@e2e/scripts/containerd $(or $(VERSION),2)
	@$(BIN)/boxlite-e2e conformance --home qemu --containerd $(or $(VERSION),2) $(or $(CRITEST),--transport nri)

bench: build
	@$(BIN)/boxlite-e2e bench

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

unit:
	cargo test --locked --workspace

fmt:
	cargo fmt --all

install:
	@e2e/scripts/install "$(DESTDIR)" "$(PREFIX)"

clean:
	cargo clean
