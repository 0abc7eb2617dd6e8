//! Placeholder of the first commit; its owner replaces it.
fn main() {}
