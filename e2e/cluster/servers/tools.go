//go:build tools

// Package servers pins etcd and the servers of the cluster's pods; e2e/scripts/cluster-build builds them from here.
package servers

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/sample-apiserver"
)
