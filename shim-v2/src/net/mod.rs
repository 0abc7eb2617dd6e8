//! The pod's network on the host's side: a tap beside the CNI plugin's interface, and what the guest is told about it.

pub mod tap;
