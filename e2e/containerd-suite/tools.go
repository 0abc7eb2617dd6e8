//go:build tools

// Package containerdsuite pins containerd's CRI integration tests; `make conformance-containerd-suite` builds them from here.
package containerdsuite

import (
	_ "github.com/containerd/containerd/v2/integration/images"
	_ "github.com/containerd/containerd/v2/integration/remote"
)
