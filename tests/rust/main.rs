//! The crate's tests, one binary.

mod checkpoint;
mod io;
