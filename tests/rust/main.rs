//! All Rust tests, as one binary: it links once.

mod disassembly;
mod kernels;
