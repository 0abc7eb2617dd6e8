//! The index of boxes ([`box_manager`]) and the state machine of one box ([`box_state`]), without I/O.

pub mod box_manager;
pub mod box_state;
