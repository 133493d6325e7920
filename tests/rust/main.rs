//! The crate's tests, one binary.
#![expect(clippy::unwrap_used, reason = "a test that fails may panic")]

mod checkpoint;
mod hostile;
mod io;
mod layout;
