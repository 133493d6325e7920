//! How far apart stored floats are, in steps between neighbours of their type.

use super::convert::check_bytes;
use super::level::{Kernel, Level};
use crate::dtype::DType;

/// A loop over one width: the type of the bits, and a signed one that holds their ordinals.
macro_rules! distance {
    ($kernel:ident, $bits:ty, $ordinal:ty) => {
        struct $kernel<'a> {
            a: &'a [u8],
            b: &'a [u8],
            /// The bits of infinity.
            infinity: $bits,
        }

        impl $kernel<'_> {
            /// Orders as the values do; both zeros are 0, any NaN is one more than infinity.
            #[inline(always)]
            fn ordinal(&self, bytes: [u8; size_of::<$bits>()]) -> $ordinal {
                let bits = <$bits>::from_le_bytes(bytes);
                let magnitude = bits & (<$bits>::MAX >> 1);
                let (is_negative, is_nan) = (bits != magnitude, magnitude > self.infinity);
                let ordinal = magnitude.min(self.infinity + 1) as $ordinal;
                if is_negative & !is_nan { -ordinal } else { ordinal }
            }
        }

        impl Kernel for $kernel<'_> {
            type Output = (u64, u64);

            #[inline(always)]
            fn run(self) -> (u64, u64) {
                let (mut largest, mut differing) = (0, 0);
                for (&a, &b) in self.a.as_chunks().0.iter().zip(self.b.as_chunks().0) {
                    let distance = self.ordinal(a).abs_diff(self.ordinal(b));
                    largest = distance.max(largest);
                    differing += u64::from(distance != 0);
                }
                (u64::from(largest), differing)
            }
        }
    };
}
distance!(Distance16, u16, i32);
distance!(Distance32, u32, i32);
distance!(Distance64, u64, i64);

/// The largest distance of two elements, and how many differ.
///
/// # Panics
///
/// If the slices differ in length, or the type is no float.
pub fn ulp_distance(level: Level, dtype: DType, a: &[u8], b: &[u8]) -> (u64, u64) {
    assert_eq!(a.len(), b.len(), "both sides must have the same length");
    check_bytes("a side", dtype, a, a.len() / dtype.size());
    match dtype {
        DType::F16 => level.run(Distance16 { a, b, infinity: 0x7C00 }),
        DType::Bf16 => level.run(Distance16 { a, b, infinity: 0x7F80 }),
        DType::F32 => level.run(Distance32 { a, b, infinity: 0x7F80_0000 }),
        _ => level.run(Distance64 { a, b, infinity: 0x7FF0_0000_0000_0000 }),
    }
}
