//! Tests of the VMM boundary that need no VM.
