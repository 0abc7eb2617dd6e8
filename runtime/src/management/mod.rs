//! Which boxes there are ([`box_manager`]) and what may happen to one ([`box_state`]). No I/O here.

pub mod box_manager;
pub mod box_state;
