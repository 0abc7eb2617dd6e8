# boxlite-cri: build, demo, tests and measurements. Targets are idempotent and reuse existing results.
#
# PROFILE selects the Cargo profile. Demo, tests and bench use `dev` (unoptimized for short builds, except the dependencies
# that move data or run in the guest). For a node: make build PROFILE=release && make install PROFILE=release. The agent is
# static and stripped, since every VM boots it; a release optimizes it for size.

CACHE      ?= $(or $(BOXLITE_CACHE),$(HOME)/.cache/boxlite-cri)
PREFIX     ?= /usr/local
TARGET     ?= $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
PROFILE    ?= dev
OUT        := $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
GUEST      := $(TARGET)/agent-$(OUT)/boxlite-guest
BIN        := $(TARGET)/$(OUT)

export BOXLITE_CACHE := $(CACHE)
export BOXLITE_GUEST := $(GUEST)
export BOXLITE_BIN   := $(BIN)
export PROFILE
export CARGO_TARGET_DIR := $(TARGET)
export PATH := $(HOME)/.cargo/bin:$(PATH)
COMMA := ,
# Features with the tests that need root. Without them `cargo test` runs what any user can run.
export ROOT_TESTS := $(if $(filter 0,$(shell id -u)),--features boxlite-erofs/root-tests$(COMMA)boxlite-runtime/root-tests$(COMMA)boxlite-shim-v2/root-tests$(COMMA)boxlite-cri/root-tests)
# Size limit of the release agent in bytes.
AGENT_MAX_BYTES := 8140000

.PHONY: all tools kernel build demo install clean help
.PHONY: test unit fuzz kills test-collectors lint deny advisories fmt agent-size e2e-qemu e2e-krun
.PHONY: conformance conformance-krun conformance-containerd conformance-containerd-suite test-containerd
.PHONY: cluster test-cluster test-agents conformance-cluster bench-cluster bench bench-work bench-memory bench-peers bench-churn bench-density
.PHONY: dist test-dist image chart chart-update test-chart test-host-pods
all: build

help:
	@echo "make demo                    install dependencies, build, and show a pod in a real VM from pull to removal"
	@echo "make test                    lints, unit tests, end-to-end tests on QEMU and libkrun (about 30 minutes on two cores)"
	@echo "make e2e-qemu FILTER=logs    end-to-end cases on QEMU whose name contains the filter; e2e-krun for libkrun"
	@echo "make lint                    cargo fmt, clippy, shellcheck, and cargo-deny (also: make deny) for dependencies"
	@echo "make advisories              security advisories for dependencies, from the RustSec database on GitHub"
	@echo "make unit                    unit and property tests"
	@echo "make kills KILLS=1000        kill -9 of the daemon at random moments of a pod's start, 3 s each; leaks fail it"
	@echo "make test-collectors         traces through the OpenTelemetry Collector, the dashboard's queries in Prometheus"
	@echo "make fuzz                    mutated inputs for every parser of untrusted data (FUZZ_SECONDS=25 for each)"
	@echo "make conformance             critest, the conformance suite of CRI runtimes (docs/conformance.md)"
	@echo "make test-containerd         the shim under containerd 1.6 and 2.x"
	@echo "make conformance-containerd  critest against containerd's CRI plugin with the shim"
	@echo "make cluster                 a Kubernetes cluster on this runtime, with a shell that has KUBECONFIG"
	@echo "make test-cluster            the project's cases on that cluster (FILTER=clients::)"
	@echo "make test-agents             agent-sandbox on that cluster, and the time of its claims with each pool and without (CLAIMS=)"
	@echo "make conformance-cluster     Kubernetes' own suite on that cluster (FOCUS='regular expression')"
	@echo "make bench-cluster           Deployments on it, beside containerd 2.x with runc under the same kubelet"
	@echo "make conformance-containerd-suite  containerd's CRI integration tests"
	@echo "make bench                   ratios against a bare boot of the same VMM and kernel"
	@echo "make bench-work              a pod's calls in guest instructions, which neither load nor the machine changes"
	@echo "make bench-memory            memory of idle pods by process and kind (PODS=)"
	@echo "make bench-peers             the same pods by runc and gVisor under containerd, interleaved in one run (PODS=)"
	@echo "make bench-churn             1,000 pods one after another and 100 at once (PODS=, AT_ONCE=), then a comparison"
	@echo "make bench-density           idle pods up to 100 (PODS=, MEMORY= MiB each): memory, lists, statistics, scrapes"
	@echo "make build                   build the programs into $(TARGET)"
	@echo "make install                 install the programs below PREFIX (default /usr/local)"
	@echo "make dist PROFILE=release    .deb, tarball, SBOM and checksums in $(TARGET)/dist; make test-dist tries them in Debian 12 and 13"
	@echo "make image PROFILE=release   image of the installer, an OCI layout in $(TARGET)/image; make chart checks charts/boxlite"
	@echo "make test-chart              the chart on a cluster whose node runs a stock containerd"
	@echo "make test-host-pods          a cluster whose kube-proxy runs in a stock containerd, and all else in VMs"
	@echo "make kernel                  a guest kernel with iptables, IPVS, wireguard, NFS and PSI (docs/guest-kernel.md), 15 minutes"
	@echo "make tools                   Debian packages, the guest kernel, virtiofsd, vhost-device-vsock and passt"

tools:
	@e2e/scripts/tools

# A guest kernel with what pods expect of a node's: docs/guest-kernel.md. Optional; prints the path of the library.
kernel:
	@e2e/scripts/kernel

build:
	@e2e/scripts/build

demo: export BOXLITE_STEPS := 5
demo:
	@e2e/scripts/build --demo
	@echo '[5/5] a pod from pull to removal'
	@$(BIN)/boxlite-e2e demo

# All checks, with one line of counts per suite and a last line "N passed, N failed, N skipped".
test: build
	@e2e/scripts/test-all

# One suite, optionally some cases: make e2e-qemu FILTER=logs
e2e-qemu: build
	@$(BIN)/boxlite-e2e test --backend qemu --junit $(TARGET)/junit $(if $(FILTER),--filter $(FILTER))

e2e-krun: build
	@e2e/kvmhost/run -- $(BIN)/boxlite-e2e test --backend krun --junit $(TARGET)/junit $(if $(FILTER),--filter $(FILTER))

# Opt-in: kills the daemon KILLS times at random moments of a pod's start, and looks for leaks after each.
kills: build
	@BOXLITE_E2E_KILLS=$(or $(KILLS),1000) $(BIN)/boxlite-e2e test --backend qemu --filter killed_daemon_at_random

# Opt-in: the trace of a pod's start through the OpenTelemetry Collector, which prints it to $(CACHE)/otelcol/otelcol.log, and the
# queries of the chart's dashboard and alerts in Prometheus.
test-collectors: export BOXLITE_E2E_OTELCOL = $(CACHE)/otelcol/otelcol
test-collectors: export BOXLITE_E2E_PROMETHEUS = $(CACHE)/prometheus
test-collectors: build
	@e2e/scripts/otelcol >/dev/null
	@e2e/scripts/promtool >/dev/null
	@$(BIN)/boxlite-e2e test --backend qemu --filter collectors::

# critest on QEMU, three times. For one run of some specs: make conformance CRITEST="--transport spdy --focus Networking"
conformance: build
	@e2e/scripts/critest >/dev/null
	@$(BIN)/boxlite-e2e conformance --backend qemu $(CRITEST)

# critest on libkrun in the emulated KVM host, which is several times slower: one run, NRI with SPDY.
conformance-krun: build
	@e2e/scripts/critest >/dev/null
	@e2e/kvmhost/run --timeout 14400 -- $(BIN)/boxlite-e2e conformance --backend krun $(or $(CRITEST),--transport nri)

# The shim under stock containerds 1.6 and 2.x, without boxlite-cri, on QEMU; with VMM=krun on libkrun in the emulated KVM
# host. VERSION=1.6 or 2 selects one version; 1.7 and 2.3 are built from source first. The upgrade case uses 2.x.
test-containerd: build
	@e2e/scripts/containerd $(if $(VERSION),$(sort $(VERSION) 2))
	@$(if $(filter krun,$(VMM)),e2e/kvmhost/run --timeout 3000 --) $(BIN)/boxlite-e2e containerd --backend $(or $(VMM),qemu) \
	  $(if $(VERSION),--version $(VERSION)) $(if $(FILTER),--filter $(FILTER))

# critest against a stock containerd with the shim as handler, on QEMU, SPDY and NRI. VERSION=1.6 selects 1.6, without NRI.
conformance-containerd: build
	@e2e/scripts/critest >/dev/null
	@e2e/scripts/containerd $(or $(VERSION),2)
	@$(BIN)/boxlite-e2e conformance --backend qemu --containerd $(or $(VERSION),2) $(or $(CRITEST),--transport nri)

# A one-node Kubernetes with boxlite-cri as its only runtime. The first run builds Kubernetes, about 25 minutes on two cores.
# COMMAND='kubectl get pods -A' runs a command instead of the shell.
cluster: build
	@e2e/scripts/cluster-build >/dev/null
	@$(BIN)/boxlite-e2e cluster shell $(if $(COMMAND),--command '$(COMMAND)')

test-cluster: build
	@e2e/scripts/cluster-build >/dev/null
	@$(BIN)/boxlite-e2e cluster test --junit $(TARGET)/junit $(if $(FILTER),--filter $(FILTER))

# The controller of agent-sandbox; its first build takes some minutes.
test-agents: build
	@e2e/scripts/cluster-build agents >/dev/null
	@$(BIN)/boxlite-e2e cluster agents $(if $(CLAIMS),--claims $(CLAIMS))

# Time until the pods of a Deployment are Ready, on boxlite-cri and on containerd 2.x with runc.
bench-cluster: build
	@e2e/scripts/cluster-build >/dev/null
	@e2e/scripts/containerd 2
	@$(BIN)/boxlite-e2e cluster bench

# Kubernetes' own suite, by default the specs of a NodeConformance run: FOCUS and SKIP are regular expressions, PROCS is the
# number of parallel processes.
conformance-cluster: build
	@e2e/scripts/cluster-build suite >/dev/null
	@$(BIN)/boxlite-e2e cluster conformance --out $(TARGET)/conformance-cluster $(if $(FOCUS),--focus '$(FOCUS)') \
	  $(if $(SKIP),--skip '$(SKIP)') $(if $(PROCS),--procs $(PROCS))

# containerd's own CRI integration tests against boxlite-cri on QEMU. FILTER=Nri selects tests by a part of their name.
conformance-containerd-suite: build
	@e2e/scripts/containerd-suite >/dev/null
	@$(BIN)/boxlite-e2e containerd-suite --backend qemu $(if $(FILTER),--filter $(FILTER))

bench: build
	@$(BIN)/boxlite-e2e bench

bench-work: build
	@$(BIN)/boxlite-e2e bench work

# Memory of idle pods; PODS=20 starts that many.
bench-memory: build
	@$(BIN)/boxlite-e2e bench memory $(if $(PODS),--pods $(PODS))

# GVISOR=1 builds gVisor's runsc first, which takes ten minutes and more.
bench-peers: build
	@e2e/scripts/containerd 2
	@$(if $(GVISOR),e2e/scripts/gvisor)
	@$(BIN)/boxlite-e2e bench peers $(if $(PODS),--pods $(PODS))

bench-churn: build
	@$(BIN)/boxlite-e2e churn $(if $(PODS),--pods $(PODS)) $(if $(AT_ONCE),--at-once $(AT_ONCE))

bench-density: build
	@$(BIN)/boxlite-e2e density $(if $(PODS),--pods $(PODS)) $(if $(MEMORY),--memory $(MEMORY))

lint:
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@e2e/scripts/lint-scripts
	@e2e/scripts/deny

# Licenses, bans, duplicate versions and sources of dependencies (deny.toml), as in `make lint`.
deny:
	@e2e/scripts/deny

# Not a part of `make lint`: downloads the RustSec database, whose contents change from day to day.
advisories:
	@e2e/scripts/deny advisories

unit:
	@e2e/scripts/unit $(ROOT_TESTS)

# Inputs that fail are printed; BOXLITE_FUZZ_SEED repeats a run.
fuzz:
	BOXLITE_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),25) cargo test --locked --workspace --lib --bins -- --nocapture fuzz_

# Fails if the release agent exceeds its size limit.
agent-size:
	cargo build --locked --profile agent -p boxlite-guest
	@e2e/scripts/agent $(TARGET)/agent/boxlite-guest $(TARGET)/agent-release/boxlite-guest
	@e2e/scripts/check-size $(TARGET)/agent-release/boxlite-guest $(AGENT_MAX_BYTES)

fmt:
	cargo fmt --all

install:
	@e2e/scripts/install "$(DESTDIR)" "$(PREFIX)"

# Packages in $(TARGET)/dist. The same commit and programs give the same bytes.
dist: build
	@e2e/scripts/dist "$(TARGET)/dist"

# Packs twice and compares; installs, upgrades and purges the .deb in Debian 12 and 13 (VERSION=12 selects one), and compares
# the file trees.
test-dist: dist
	@umask 077 && TZ=Asia/Tokyo e2e/scripts/dist "$(TARGET)/dist-again" >/dev/null
	@cmp "$(TARGET)/dist/SHA256SUMS" "$(TARGET)/dist-again/SHA256SUMS" && echo 'packed twice: same checksums'
	@rm -r "$(TARGET)/dist-again"
	@e2e/scripts/debian-roots $(or $(VERSION),12 13)
	@$(BIN)/boxlite-e2e packages --dist "$(TARGET)/dist" $(or $(VERSION),12 13)

# The installer's image as an OCI layout in $(TARGET)/image, its digest and SBOM beside it.
image: build
	@e2e/scripts/image "$(TARGET)/image"

# The chart: helm lint, golden files, schema and alerts. chart-update writes the README and the golden files.
chart:
	@e2e/scripts/chart

chart-update: build
	@$(BIN)/boxlite-dist chart-readme charts/boxlite
	@e2e/scripts/chart update

# The chart on a one-node cluster with a stock containerd 2.x and runc: install, pods, upgrade, uninstall, leak check.
test-chart: image
	@e2e/scripts/cluster-build >/dev/null
	@e2e/scripts/containerd 2
	@e2e/scripts/helm >/dev/null
	@$(BIN)/boxlite-e2e cluster chart --chart charts/boxlite --image "$(TARGET)/image"

# boxlite-cri with host pods on a one-node cluster: kube-proxy and a static pod in a stock containerd, CoreDNS and pods in VMs.
test-host-pods: build
	@e2e/scripts/cluster-build >/dev/null
	@e2e/scripts/containerd 2
	@$(BIN)/boxlite-e2e cluster host-pods

clean:
	cargo clean
