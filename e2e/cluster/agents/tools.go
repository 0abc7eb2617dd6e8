//go:build tools

// Package agents pins the controller of agent-sandbox; e2e/scripts/cluster-build builds it from here.
package agents

import _ "sigs.k8s.io/agent-sandbox/cmd/agent-sandbox-controller"
