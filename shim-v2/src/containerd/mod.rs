//! What a containerd leaves unsaid: it starts this shim like any other and knows nothing of VMs.
//!
//! [`config`] is the TOML file that stands in for boxlite-cri's options, [`annotations`] what a pod may change of it,
//! [`plan`] makes a pod's [`Plan`](crate::sandbox::options::Plan) out of an OCI spec or of CRI's pod configuration,
//! [`etc`] the files that a sandboxer owes its containers, [`pause`] is the task that containerd's CRI plugin takes for the pod. With boxlite-cri none of this runs.

pub mod annotations;
pub mod config;
pub mod etc;
pub mod pause;
pub mod plan;
pub mod private_net;
