//! Widening stored elements to the working type, and narrowing results back.
//!
//! Widening is exact. Narrowing rounds once, to nearest even, keeps subnormals, overflows to
//! infinity, and writes every NaN as one pattern. CPUs have instructions for some of this, but
//! none that fits: VCVTNEPS2BF16 flushes subnormals, F16C keeps NaN payloads, and nothing goes
//! from f64 to bf16. Integer arithmetic does all of it alike, at every level:
//!
//! 1. No branches. Each case (normal, subnormal, NaN) is computed and a select picks one, so that
//!    the loop vectorises. The unused case may compute nonsense.
//! 2. f16 subnormals go through the adder and the integer converter: an f16 subnormal is an integer
//!    times 2⁻²⁴, and adding 0.5 to a small f32 leaves it rounded to a multiple of 2⁻²⁴, since that
//!    is the last place of 0.5. Both are exact about ties and need no loop over leading zeros.
//! 3. f64 to a 16-bit type takes two roundings of which the first is to odd, which makes the pair
//!    correct (`Real::to_f32_odd`).
//!
//! Elements are byte arrays, so no address needs to be aligned.

use super::level::{Kernel, Level};
use super::real::Real;
use crate::dtype::DType;

/// How a float type is stored.
pub(crate) trait Format: Copy {
    /// The bytes of an element, little-endian.
    type Bytes: Copy;
    /// The greatest finite value.
    const LARGEST: f64;

    /// All elements of a slice whose length is a multiple of the size.
    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    /// The same, to write to.
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Bytes];
    /// The exact value; must not be asked for f64 in f32.
    fn widen<T: Real>(bytes: Self::Bytes) -> T;
    /// The nearest stored value.
    fn narrow<T: Real>(value: T) -> Self::Bytes;
}

/// BF16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;
/// F16.
#[derive(Clone, Copy)]
pub(crate) struct F16;
/// F32.
#[derive(Clone, Copy)]
pub(crate) struct F32;
/// F64.
#[derive(Clone, Copy)]
pub(crate) struct F64;

macro_rules! impl_format {
    ($format:ident, $size:literal, $largest:expr, |$bytes:ident| $widen:expr, |$value:ident| $narrow:expr) => {
        impl Format for $format {
            type Bytes = [u8; $size];
            const LARGEST: f64 = $largest;

            #[inline(always)]
            fn elements(bytes: &[u8]) -> &[Self::Bytes] {
                bytes.as_chunks().0
            }

            #[inline(always)]
            fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Bytes] {
                bytes.as_chunks_mut().0
            }

            #[inline(always)]
            fn widen<T: Real>($bytes: Self::Bytes) -> T {
                $widen
            }

            #[inline(always)]
            fn narrow<T: Real>($value: T) -> Self::Bytes {
                $narrow
            }
        }
    };
}

impl_format!(
    Bf16,
    2,
    f32::from_bits(0x7F7F_0000) as f64,
    |bytes| T::from_f32(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)),
    |value| narrow_bf16(value.to_f32_odd()).to_le_bytes()
);
impl_format!(
    F16,
    2,
    65_504.0,
    |bytes| T::from_f32(widen_f16(u16::from_le_bytes(bytes))),
    |value| narrow_f16(value.to_f32_odd()).to_le_bytes()
);
impl_format!(F32, 4, f32::MAX as f64, |bytes| T::from_f32(f32::from_le_bytes(bytes)), |value| {
    let nearest = value.to_f32();
    let canonical = if nearest.is_nan() { <f32 as Real>::NAN } else { nearest };
    canonical.to_le_bytes()
});
impl_format!(F64, 8, f64::MAX, |bytes| T::from_f64(f64::from_le_bytes(bytes)), |value| {
    let exact = value.to_f64();
    let canonical = if exact.is_nan() { <f64 as Real>::NAN } else { exact };
    canonical.to_le_bytes()
});

#[inline(always)]
fn widen_f16(half: u16) -> f32 {
    let bits = u32::from(half);
    let sign = (bits & 0x8000) << 16;
    let magnitude = bits & 0x7FFF;
    // The exponent's bias is 15 in f16 and 127 in f32; infinity and NaN go to the top.
    let normal = (magnitude << 13) + (112 << 23);
    let special = (magnitude << 13) | 0x7F80_0000;
    let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();
    let finite = if magnitude < 0x0400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude < 0x7C00 { finite } else { special })
}

#[inline(always)]
fn narrow_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    // Just under half of the last place, and the tie goes up if that place is odd. A carry runs
    // into the exponent and, from the greatest finite value, on to infinity: both are right.
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    (if value.is_nan() { 0x7FC0 } else { rounded }) as u16
}

#[inline(always)]
fn narrow_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7FFF_FFFF;
    let rounded = magnitude.wrapping_add(0xFFF + ((magnitude >> 13) & 1));
    let normal = (rounded.wrapping_sub(112 << 23) >> 13).min(0x7C00);
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    (if value.is_nan() { 0x7E00 } else { sign | finite }) as u16
}

struct Widen<'a, T, F: Format> {
    src: &'a [F::Bytes],
    dst: &'a mut [T],
}

impl<T: Real, F: Format> Kernel for Widen<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (wide, &bytes) in self.dst.iter_mut().zip(self.src) {
            *wide = F::widen(bytes);
        }
    }
}

struct WidenDifference<'a, T, F: Format> {
    src: &'a [F::Bytes],
    base: &'a [T],
    dst: &'a mut [T],
}

impl<T: Real, F: Format> Kernel for WidenDifference<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((difference, &bytes), &base) in self.dst.iter_mut().zip(self.src).zip(self.base) {
            *difference = F::widen::<T>(bytes) - base;
        }
    }
}

struct Narrow<'a, T, F: Format> {
    src: &'a [T],
    dst: &'a mut [F::Bytes],
}

impl<T: Real, F: Format> Kernel for Narrow<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (bytes, &value) in self.dst.iter_mut().zip(self.src) {
            *bytes = F::narrow(value);
        }
    }
}

/// Asserts that `bytes` is `count` elements of a float type.
pub(crate) fn check_bytes(what: &str, dtype: DType, bytes: &[u8], count: usize) {
    assert!(dtype.is_float(), "{what} must be a float type, not {dtype}");
    assert_eq!(
        bytes.len(),
        count * dtype.size(),
        "{what} must have the bytes of {count} elements of {dtype}"
    );
}

/// Widens stored elements to the working type. Exact.
///
/// # Panics
///
/// If `src` is not `dst.len()` elements of a float type, or if F64 would have to fit f32.
pub fn widen<T: Real>(level: Level, dtype: DType, src: &[u8], dst: &mut [T]) {
    fn go<T: Real, F: Format>(level: Level, src: &[u8], dst: &mut [T]) {
        level.run(Widen::<T, F> { src: F::elements(src), dst });
    }
    check_bytes("the source", dtype, src, dst.len());
    match dtype {
        DType::Bf16 => go::<T, Bf16>(level, src, dst),
        DType::F16 => go::<T, F16>(level, src, dst),
        DType::F32 => go::<T, F32>(level, src, dst),
        DType::F64 if size_of::<T>() == 8 => go::<T, F64>(level, src, dst),
        _ => unreachable!("{dtype} does not widen to {}", std::any::type_name::<T>()),
    }
}

/// Widens stored elements and subtracts a base: `dst[i] = src[i] − base[i]`, rounded once.
///
/// # Panics
///
/// As [`widen`] does, or if `base` is not as long as `dst`.
pub fn widen_difference<T: Real>(
    level: Level,
    dtype: DType,
    src: &[u8],
    base: &[T],
    dst: &mut [T],
) {
    fn go<T: Real, F: Format>(level: Level, src: &[u8], base: &[T], dst: &mut [T]) {
        level.run(WidenDifference::<T, F> { src: F::elements(src), base, dst });
    }
    check_bytes("the source", dtype, src, dst.len());
    assert_eq!(base.len(), dst.len(), "the base and the output must have the same length");
    match dtype {
        DType::Bf16 => go::<T, Bf16>(level, src, base, dst),
        DType::F16 => go::<T, F16>(level, src, base, dst),
        DType::F32 => go::<T, F32>(level, src, base, dst),
        DType::F64 if size_of::<T>() == 8 => go::<T, F64>(level, src, base, dst),
        _ => unreachable!("{dtype} does not widen to {}", std::any::type_name::<T>()),
    }
}

struct NarrowToBool<'a, T> {
    src: &'a [T],
    dst: &'a mut [u8],
}

impl<T: Real> Kernel for NarrowToBool<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (byte, &value) in self.dst.iter_mut().zip(self.src) {
            *byte = u8::from(value != T::ZERO);
        }
    }
}

/// 1 where a value is not 0, NaN included, else 0: the bytes of a BOOL.
///
/// # Panics
///
/// If `dst` is not as long as `src`.
pub fn narrow_to_bool<T: Real>(level: Level, src: &[T], dst: &mut [u8]) {
    assert_eq!(src.len(), dst.len(), "the destination must have a byte for each value");
    level.run(NarrowToBool { src, dst });
}

/// Narrows the working type to stored elements, rounding once, to nearest even.
///
/// # Panics
///
/// If `dst` is not `src.len()` elements of a float type.
pub fn narrow<T: Real>(level: Level, src: &[T], dtype: DType, dst: &mut [u8]) {
    fn go<T: Real, F: Format>(level: Level, src: &[T], dst: &mut [u8]) {
        level.run(Narrow::<T, F> { src, dst: F::elements_mut(dst) });
    }
    check_bytes("the destination", dtype, dst, src.len());
    match dtype {
        DType::Bf16 => go::<T, Bf16>(level, src, dst),
        DType::F16 => go::<T, F16>(level, src, dst),
        DType::F32 => go::<T, F32>(level, src, dst),
        DType::F64 => go::<T, F64>(level, src, dst),
        _ => unreachable!("checked to be a float type"),
    }
}
