//! Boxes against a fake shim.
