//! The three inner products of two stored inputs, in one go.
//!
//! SLERP needs a·a, a·b and b·b of whole tensors. Made one by one from widened chunks, each element
//! is loaded and converted twice and more; here it is widened in registers once. The sums are those
//! of [`dot_into`](super::dot_into): the same lanes, the same order, the same bits.

use super::convert::{Bf16, F16, F32, Format, check_bytes};
use super::level::{Kernel, Level};
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

struct Products<'a, F: Format> {
    a: &'a [F::Bytes],
    b: &'a [F::Bytes],
    lanes: &'a mut [Lanes; 3],
}

/// Adds the products of up to [`LANES`] elements to the first lanes.
#[inline(always)]
fn add<F: Format>(a: &[F::Bytes], b: &[F::Bytes], [aa, ab, bb]: &mut [Lanes; 3]) {
    for lane in 0..a.len() {
        let (a, b) = (f64::from(F::widen::<f32>(a[lane])), f64::from(F::widen::<f32>(b[lane])));
        aa[lane] += a * a;
        ab[lane] += a * b;
        bb[lane] += b * b;
    }
}

impl<F: Format> Kernel for Products<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // A copy, so that the lanes stay in registers.
        let mut lanes = *self.lanes;
        let (a, a_rest) = self.a.as_chunks::<LANES>();
        let (b, b_rest) = self.b.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            add::<F>(a, b, &mut lanes);
        }
        add::<F>(a_rest, &b_rest[..a_rest.len()], &mut lanes);
        *self.lanes = lanes;
    }
}

/// Adds a·a, a·b and b·b of stored elements to the lanes, multiplied in f64. The slices start at a
/// multiple of 16 in their block.
///
/// # Panics
///
/// If the slices differ in length, or the type is not BF16, F16 or F32.
pub fn products_into(level: Level, dtype: DType, a: &[u8], b: &[u8], lanes: &mut [Lanes; 3]) {
    fn go<F: Format>(level: Level, a: &[u8], b: &[u8], lanes: &mut [Lanes; 3]) {
        level.run(Products::<F> { a: F::elements(a), b: F::elements(b), lanes });
    }
    assert_eq!(a.len(), b.len(), "the factors must have the same length");
    check_bytes("a factor", dtype, a, a.len() / dtype.size());
    match dtype {
        DType::Bf16 => go::<Bf16>(level, a, b, lanes),
        DType::F16 => go::<F16>(level, a, b, lanes),
        DType::F32 => go::<F32>(level, a, b, lanes),
        _ => unreachable!("{dtype} is not widened to f32"),
    }
}
