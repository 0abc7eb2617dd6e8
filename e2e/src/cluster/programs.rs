//! [`Programs`]: paths of the programs that e2e/scripts/cluster-build provides. Builds nothing.

use crate::bail;
use crate::failure::Result;
use crate::install;
use std::path::PathBuf;

/// Directory of the programs and the unpacked Debian packages.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    root: PathBuf,
}

impl Programs {
    /// Finds the directory. The error names the first missing program.
    pub(crate) fn find() -> Result<Self> {
        let programs = Self {
            root: install::cache().join("cluster"),
        };
        let needed = [
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kube-proxy",
            "kubelet",
            "kubectl",
            "agnhost",
            "coredns",
            "etcd",
        ];
        for path in needed.map(|name| programs.program(name)) {
            if !path.exists() {
                bail!(
                    "{} not found: run e2e/scripts/cluster-build",
                    path.display()
                );
            }
        }
        Ok(programs)
    }

    /// Returns the directory of the Go programs.
    pub(crate) fn bin(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// Returns the path of a Go program.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin().join(name)
    }

    /// Returns the root of the unpacked network clients of the test images.
    pub(crate) fn clients(&self) -> PathBuf {
        self.root.join("clients")
    }

    /// Returns the path of the setuid program of e2e/critest/nnp.c.
    pub(crate) fn nnp(&self) -> PathBuf {
        self.root.join("nnp")
    }

    /// Returns the path of Kubernetes' pause program, which only its test suite needs.
    pub(crate) fn pause(&self) -> PathBuf {
        self.root.join("pause")
    }

    /// Returns the path of the program of e2e/cluster/sh.c, which only Kubernetes' test suite needs.
    pub(crate) fn suite_shell(&self) -> PathBuf {
        self.root.join("sh")
    }

    /// Returns the directory of agent-sandbox's manifests, which only `make test-agents` needs.
    pub(crate) fn agents(&self) -> PathBuf {
        self.root.join("agents")
    }

    /// Returns the path of Debian's nginx.
    pub(crate) fn nginx(&self) -> PathBuf {
        self.root.join("nginx/usr/sbin/nginx")
    }
}
