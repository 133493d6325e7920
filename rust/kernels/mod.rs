//! The arithmetic: plain loops over slices, compiled once per instruction set.
//!
//! The problem: a merge must run at the speed of the memory on any CPU, and must give the same
//! bytes on every one of them. `NUMERICS.md` beside this file says which bytes; the code here is
//! written so that no compiler and no CPU has a choice in it.
//!
//! The idea: each kernel is one ordinary loop, generic over the working type ([`Real`]: f32 or
//! f64) and written without intrinsics. [`level`] compiles that loop once per instruction set and
//! picks one at run time. Wider registers then change how many elements a step takes, and nothing
//! else:
//!
//! 1. Elementwise loops have no order between elements. Multiply and add stay separate (Rust never
//!    contracts them), so an element's value cannot depend on the width.
//! 2. Sums have an order, so it is fixed in the data: sixteen lanes by index ([`reduce`]). The
//!    compiler may spread the lanes over registers, but never reorder within one.
//! 3. Conversions are integer arithmetic with selects instead of branches ([`convert`]), which
//!    vectorises at every level and does not depend on the rounding mode.
//! 4. What ranks does so by an integer key of the bits ([`order`]), random numbers are a pure
//!    function of the index ([`random`]): neither has state that a width could change.
//!
//! [`oracle`] has each kernel again, one element at a time and without tricks. The tests demand
//! equal bits at every level.

#![expect(
    clippy::inline_always,
    reason = "a loop that is not inlined into its shell is compiled without the shell's features"
)]

pub mod bracket;
pub mod compare;
pub mod consensus;
pub mod convert;
pub mod differences;
pub mod differing;
pub mod elementwise;
pub mod gram;
pub mod level;
pub mod low_rank;
pub mod mask_bits;
pub mod norms;
pub mod oracle;
pub mod order;
pub mod random;
pub mod rank;
pub mod real;
pub mod reduce;
pub mod sum_bytes;
pub mod thinned;
mod transcendental;
pub mod ulp;
pub mod weighted;

pub use bracket::{Cuts, bracket};
pub use compare::{CELL, CELLS, COMPARISON_VERSION, Comparison, compare};
pub use consensus::elect;
pub(crate) use consensus::{CANCELLED, cancels};
pub use convert::{narrow, narrow_to_bool, widen, widen_difference};
pub use differences::{Differences, differences_into};
pub use differing::differing;
pub use elementwise::{BinaryOp, Operand, UnaryOp, binary, select, unary};
pub use gram::products_into;
pub use level::Level;
pub use low_rank::{Product, TILE, Tiles, low_rank_bytes};
pub use mask_bits::{BITS, MaskBits, SPAN, mask_from, masked, pack_mask, unpack_mask};
pub use norms::norms_into;
pub use order::{
    Counts, Ends, collect, collect_magnitudes, count, histogram, keep, mark_largest, ordinals, trim,
};
pub use random::{GENERATOR_VERSION, MaskKey, draws, random_bits, random_mask};
pub use rank::{Descent, Picked, Ranker, bound};
pub use real::{Ordinal, Real};
pub use reduce::{
    BLOCK, LANES, Lanes, REDUCTION_VERSION, absolute_sum_into, dot_into, fold_halves, max_into,
    sum_into,
};
pub use sum_bytes::{Update, update_bytes, weighted_difference_sum_bytes, weighted_sum_bytes};
pub use thinned::{ThinnedTerm, Votes, thinned_sum_bytes};
pub use ulp::ulp_distance;
pub use weighted::weighted_sum;
