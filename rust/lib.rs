//! The engine of oxmerge: merges model checkpoints out of core.
//!
//! A merge is arithmetic on files. The engine reads the shard files block by block, computes each
//! output block with SIMD on every core, and writes it once, at its final offset. Nothing is ever
//! loaded whole: not a model, not a shard, not a tensor. `ARCHITECTURE.md` beside this file tells
//! how it is built and why; `kernels/NUMERICS.md` is the numeric contract.
//!
//! A module uses only those before it in this list: `error`, `dtype`, `plan` (data, and functions
//! that it only holds), `io`, `checkpoint`, `assembly`, `kernels`, `formula`, `methods`, `engine`,
//! `python`. Only `python` knows Python.

pub mod assembly;
pub mod checkpoint;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod formula;
pub mod io;
pub mod kernels;
pub mod methods;
pub mod plan;
#[cfg(feature = "python")]
mod python;
