//! Support for containerd, which starts this shim like any other and does not know about VMs.
//!
//! [`config`] reads the TOML file that replaces boxlite-cri's options, [`annotations`] the overrides of a pod; [`plan`] builds
//! the pod's [`Plan`](crate::sandbox::options::Plan) from an OCI spec or CRI's pod configuration; [`etc`] writes the files in
//! /etc that a sandboxer provides; [`pause`] is the task that represents the pod's pause container. None of this runs under
//! boxlite-cri.

pub mod annotations;
pub mod config;
pub mod etc;
pub mod pause;
pub mod plan;
pub mod private_net;
