//! The L1 norms of a stored task vector and of what a random mask keeps of it, in one go.
//!
//! DARE needs both of whole tensors, to rescale. Made one by one from widened chunks, each element
//! goes through the cache four times; here it is widened, subtracted and added in registers. The
//! sums are those of [`absolute_sum_into`](super::absolute_sum_into): the same lanes, the same
//! order, the same bits.

use super::convert::{Bf16, F16, F32, Format, check_bytes};
use super::level::{Kernel, Level};
use super::mask_bits::{BITS, MaskBits, SPAN};
use super::reduce::{LANES, Lanes};
use crate::dtype::DType;

/// Elements by the same bit of a mask.
const ROW: usize = SPAN / BITS;

struct Norms<'a, F: Format> {
    x: &'a [F::Bytes],
    base: &'a [F::Bytes],
    bits: &'a MaskBits,
    lanes: &'a mut [Lanes; 2],
}

/// Adds up to [`LANES`] elements to the first lanes, whose bits are those of `words`.
#[inline(always)]
fn add<F: Format>(
    x: &[F::Bytes],
    base: &[F::Bytes],
    words: &[u32],
    bit: usize,
    [all, kept]: &mut [Lanes; 2],
) {
    for lane in 0..x.len() {
        let difference = F::widen::<f32>(x[lane]) - F::widen::<f32>(base[lane]);
        let magnitude = f64::from(difference).abs();
        all[lane] += magnitude;
        kept[lane] += if words[lane] & (1 << bit) == 0 { 0.0 } else { magnitude };
    }
}

impl<F: Format> Kernel for Norms<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // A copy, so that the lanes stay in registers.
        let mut lanes = *self.lanes;
        let words = self.bits.as_chunks::<LANES>().0;
        let (x, x_rest) = self.x.as_chunks::<LANES>();
        let (base, base_rest) = self.base.as_chunks::<LANES>();
        let rows = x.chunks(ROW / LANES).zip(base.chunks(ROW / LANES));
        for (bit, (x, base)) in rows.enumerate() {
            for ((x, base), words) in x.iter().zip(base).zip(words) {
                add::<F>(x, base, words, bit, &mut lanes);
            }
        }
        if !x_rest.is_empty() {
            let (bit, words) = (x.len() / words.len(), &words[x.len() % words.len()]);
            add::<F>(x_rest, &base_rest[..x_rest.len()], words, bit, &mut lanes);
        }
        *self.lanes = lanes;
    }
}

/// Adds the magnitudes of the elements of x − base to the first lanes, of those that the mask
/// keeps to the second. The difference is rounded to f32. The slices start at a multiple of 16 in
/// their block, and the mask with them.
///
/// # Panics
///
/// If the slices differ in length or have more elements than a mask, or the type is not BF16, F16
/// or F32.
pub fn norms_into(
    level: Level,
    dtype: DType,
    x: &[u8],
    base: &[u8],
    bits: &MaskBits,
    lanes: &mut [Lanes; 2],
) {
    fn go<F: Format>(level: Level, x: &[u8], base: &[u8], bits: &MaskBits, lanes: &mut [Lanes; 2]) {
        level.run(Norms::<F> { x: F::elements(x), base: F::elements(base), bits, lanes });
    }
    let count = x.len() / dtype.size();
    assert!(count <= SPAN, "a mask has the bits of a span");
    check_bytes("the input", dtype, x, count);
    check_bytes("the base", dtype, base, count);
    match dtype {
        DType::Bf16 => go::<Bf16>(level, x, base, bits, lanes),
        DType::F16 => go::<F16>(level, x, base, bits, lanes),
        DType::F32 => go::<F32>(level, x, base, bits, lanes),
        _ => unreachable!("{dtype} is not widened to f32"),
    }
}
