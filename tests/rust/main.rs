//! All Rust tests, as one binary: it links once.
#![expect(clippy::unwrap_used, reason = "a test that fails may panic")]

mod checkpoint;
mod engine;
mod fuzzed;
mod hostile;
mod io;
mod journal;
mod kernels;
mod layout;
mod methods;
mod spool;
mod token_rows;
mod written;
