//! All Rust tests, as one binary: it links once.

mod checkpoint;
mod disassembly;
mod io;
mod kernels;
