//go:build tools

// Package critest pins the conformance suite of CRI runtimes; `make conformance` builds its test binary from here.
package critest

import _ "sigs.k8s.io/cri-tools/pkg/validate"
