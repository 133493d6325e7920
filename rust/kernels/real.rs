//! The working types, f32 and f64, and what kernels need to know about them.

use super::transcendental;
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A working type: f32 or f64.
///
/// Every operation here is exact or rounds once to nearest even, and gives the same bits on every
/// CPU. NaN results of arithmetic are the exception: their payload is the CPU's choice, so no
/// kernel lets it reach a decision, and narrowing replaces it.
pub trait Real:
    sealed::Sealed
    + Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// The order key as a signed integer of the same width. See [`Real::ordinal`].
    type Ordinal: Ordinal;

    /// +0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The canonical NaN: positive, quiet, no payload.
    const NAN: Self;

    /// From f32, exactly.
    fn from_f32(value: f32) -> Self;
    /// From f64, rounded to nearest even.
    fn from_f64(value: f64) -> Self;
    /// To f64, exactly.
    fn to_f64(self) -> f64;
    /// To f32, rounded to nearest even.
    fn to_f32(self) -> f32;
    /// To f32, rounded to odd: the first half of a correct rounding to something narrower.
    fn to_f32_odd(self) -> f32;
    /// The bits, zero-extended.
    fn bits(self) -> u64;
    /// The magnitude.
    #[must_use]
    fn abs(self) -> Self;
    /// The square root, correctly rounded.
    #[must_use]
    fn sqrt(self) -> Self;
    /// `self · factor + other`, rounded once. Slow at levels without the instruction.
    #[must_use]
    fn mul_add(self, factor: Self, other: Self) -> Self;
    /// The exponential: that of f64, rounded.
    #[must_use]
    fn exp(self) -> Self;
    /// The natural logarithm: that of f64, rounded.
    #[must_use]
    fn ln(self) -> Self;
    /// The greater; +0 is greater than −0; NaN if either is.
    #[must_use]
    fn greater_of(self, other: Self) -> Self;
    /// The lesser; −0 is less than +0; NaN if either is.
    #[must_use]
    fn lesser_of(self, other: Self) -> Self;

    /// An integer that orders as the value does: the magnitude's bits with the value's sign.
    /// Both zeros have 0. Any NaN has the greatest integer, so it ranks above infinity.
    fn ordinal(self) -> Self::Ordinal;

    /// The order key: the ordinal moved up to start at zero, so 2³¹ or 2⁶³ is that of zero.
    #[inline(always)]
    fn key(self) -> u64 {
        self.ordinal().to_key()
    }

    /// Whether it is NaN.
    #[inline(always)]
    #[expect(clippy::eq_op, reason = "only NaN differs from itself")]
    fn is_nan(self) -> bool {
        self != self
    }

    /// 1 for true, 0 for false.
    #[inline(always)]
    fn truth(value: bool) -> Self {
        if value { Self::ONE } else { Self::ZERO }
    }
}

/// The integer that a [`Real::ordinal`] is: i32 or i64.
pub trait Ordinal: sealed::Sealed + Copy + Ord + Debug + Send + Sync + 'static {
    /// The greatest key.
    const MAX_KEY: u64;
    /// Bits in which values of one power of two differ.
    const MANTISSA: u32;
    /// Counts in a loop; as wide as the ordinal, so that comparing and counting share registers.
    type Counter: Copy + Default + AddAssign + From<bool> + Into<u64>;

    /// The key of this ordinal.
    fn to_key(self) -> u64;
    /// The ordinal of this key; the key must not exceed [`Ordinal::MAX_KEY`].
    fn from_key(key: u64) -> Self;
    /// How far it lies above `low`, modulo the width.
    fn above(self, low: Self) -> Self::Distance;
    /// An unsigned distance between ordinals.
    type Distance: Copy + Ord + Default + Send + Sync + Into<u64>;
    /// `distance >> shift`, as an index. `shift` is less than the width.
    fn shifted(distance: Self::Distance, shift: u32) -> u32;
    /// What is left without the lowest `shift` bits, which are less than the width.
    #[must_use]
    fn high(self, shift: u32) -> Self;
    /// Whether one of these bits is set.
    fn has_below(self, shift: u32) -> bool;
}

macro_rules! impl_real {
    ($real:ident, $bits:ident, $ordinal:ident, $odd:path, $extent:path) => {
        impl sealed::Sealed for $ordinal {}

        impl Ordinal for $ordinal {
            const MAX_KEY: u64 = $bits::MAX as u64;
            const MANTISSA: u32 = $real::MANTISSA_DIGITS - 1;
            type Counter = $bits;
            type Distance = $bits;

            #[inline(always)]
            fn to_key(self) -> u64 {
                (self.wrapping_sub(Self::MIN) as $bits).into()
            }

            #[inline(always)]
            fn from_key(key: u64) -> Self {
                debug_assert!(key <= Self::MAX_KEY, "no value has so great a key");
                (key as Self).wrapping_add(Self::MIN)
            }

            #[inline(always)]
            fn above(self, low: Self) -> $bits {
                self.wrapping_sub(low) as $bits
            }

            #[inline(always)]
            fn shifted(distance: $bits, shift: u32) -> u32 {
                (distance >> shift) as u32
            }

            #[inline(always)]
            fn high(self, shift: u32) -> Self {
                self >> shift
            }

            #[inline(always)]
            fn has_below(self, shift: u32) -> bool {
                self & ((1 << shift) - 1) != 0
            }
        }

        impl Real for $real {
            type Ordinal = $ordinal;

            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NAN: Self =
                Self::from_bits(Self::INFINITY.to_bits() | (1 << (Self::MANTISSA_DIGITS - 2)));

            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value.into()
            }

            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }

            #[inline(always)]
            fn to_f32_odd(self) -> f32 {
                $odd(self)
            }

            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }

            #[inline(always)]
            fn abs(self) -> Self {
                self.abs()
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }

            #[inline(always)]
            fn mul_add(self, factor: Self, other: Self) -> Self {
                self.mul_add(factor, other)
            }

            #[inline(always)]
            fn exp(self) -> Self {
                transcendental::exp::<{ $extent.exp }>(f64::from(self), $extent.most) as Self
            }

            #[inline(always)]
            fn ln(self) -> Self {
                transcendental::ln::<{ $extent.ln }>(f64::from(self)) as Self
            }

            #[inline(always)]
            fn greater_of(self, other: Self) -> Self {
                // Equal values are the same bits or zeros of either sign.
                let equal = Self::from_bits(self.to_bits() & other.to_bits());
                let not_greater = if self < other { other } else { equal };
                let greatest = if self > other { self } else { not_greater };
                if self.is_nan() || other.is_nan() { <Self as Real>::NAN } else { greatest }
            }

            #[inline(always)]
            fn lesser_of(self, other: Self) -> Self {
                let equal = Self::from_bits(self.to_bits() | other.to_bits());
                let not_less = if self > other { other } else { equal };
                let least = if self < other { self } else { not_less };
                if self.is_nan() || other.is_nan() { <Self as Real>::NAN } else { least }
            }

            #[inline(always)]
            fn ordinal(self) -> $ordinal {
                let bits = self.to_bits() as $ordinal;
                let magnitude = bits & $ordinal::MAX;
                let signed = if bits < 0 { -magnitude } else { magnitude };
                if self.is_nan() { $ordinal::MAX } else { signed }
            }
        }
    };
}

impl_real!(f32, u32, i32, std::convert::identity, transcendental::F32);
impl_real!(f64, u64, i64, round_to_odd, transcendental::F64);

/// Rounds to odd: exact if f32 holds the value, else the one of its two neighbours whose last bit
/// is set.
///
/// Rounding first to f32 and then to bf16 or f16 would round twice: a value just above a tie of
/// the narrow type can land on the tie. The odd last bit is a sticky bit that keeps it off. f32 has
/// well over two bits more than either, also where they are subnormal, so the second rounding is
/// correct.
#[inline(always)]
#[expect(clippy::float_cmp, reason = "asks whether the first rounding was exact")]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // One step in magnitude towards the value. Infinity steps back to the greatest finite value.
    let stepped =
        if back.abs() > value.abs() { bits.wrapping_sub(1) } else { bits.wrapping_add(1) };
    let inexact = back != value && !value.is_nan();
    f32::from_bits(if inexact && bits & 1 == 0 { stepped } else { bits })
}
