//! All Rust tests, as one binary: it links once.

mod checkpoint;
mod disassembly;
mod hostile;
mod io;
mod kernels;
mod layout;
