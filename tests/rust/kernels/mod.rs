//! Every kernel against its oracle: the same bits, at every level that this CPU has.

mod compare;
mod consensus;
mod convert;
mod differences;
mod differing;
mod elementwise;
mod level;
mod low_rank;
mod mask_bits;
mod order;
mod random;
mod rank;
mod reduce;
mod weighted;

use oxmerge::kernels::{Level, Real};
use proptest::prelude::*;

/// Around the sizes of registers, of unrolled steps and of pieces.
const LENGTHS: [usize; 15] = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 1024, 1025, 4095];

/// A working type that tests can make up.
trait TestReal: Real {
    /// Some value of these bits.
    fn from_pattern(pattern: u64) -> Self;
    /// Any bits at all.
    fn any() -> BoxedStrategy<Self>;
    /// The values where something changes.
    fn specials() -> Vec<Self>;

    /// Specials, small numbers that often tie, and anything at all.
    fn interesting() -> BoxedStrategy<Self> {
        let small = (-8..8_i8).prop_map(|number| Self::from_f64(f64::from(number) / 4.0));
        prop_oneof![small, prop::sample::select(Self::specials()), Self::any()].boxed()
    }

    /// Slices around the lengths where loops change gear.
    fn slice() -> BoxedStrategy<Vec<Self>> {
        let length = prop_oneof![prop::sample::select(&LENGTHS[..]), 0..300_usize];
        length.prop_flat_map(|length| prop::collection::vec(Self::interesting(), length)).boxed()
    }
}

macro_rules! impl_test_real {
    ($real:ident, $bits:ident) => {
        impl TestReal for $real {
            fn from_pattern(pattern: u64) -> Self {
                Self::from_bits(pattern as $bits)
            }

            fn any() -> BoxedStrategy<Self> {
                any::<$bits>().prop_map(Self::from_bits).boxed()
            }

            fn specials() -> Vec<Self> {
                let positive = [
                    0.0,
                    Self::from_bits(1),
                    Self::MIN_POSITIVE.next_down(),
                    Self::MIN_POSITIVE,
                    Self::EPSILON,
                    1.0,
                    1.0_f32.next_up().into(),
                    65_504.0,
                    65_519.0,
                    65_520.0,
                    f32::MAX.into(),
                    Self::MAX,
                    Self::INFINITY,
                    <Self as Real>::NAN,
                    Self::from_bits(Self::INFINITY.to_bits() + 1),
                ];
                positive.into_iter().flat_map(|value| [value, -value]).collect()
            }
        }
    };
}

impl_test_real!(f32, u32);
impl_test_real!(f64, u64);

/// Makes tests that run at each available level, for both working types.
macro_rules! each_level {
    ($($(#[$meta:meta])* fn $name:ident<$real:ident>($level:ident) $body:block)+) => {$(
        #[test]
        $(#[$meta])*
        fn $name() {
            fn check<$real: crate::kernels::TestReal>($level: oxmerge::kernels::Level) $body
            for level in oxmerge::kernels::Level::available() {
                check::<f32>(level);
                check::<f64>(level);
            }
        }
    )+};
}
use each_level;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Asserts equal bits.
#[track_caller]
fn assert_bits<T: Real>(level: Level, fast: &[T], oracle: &[T]) {
    assert_eq!(fast.len(), oracle.len(), "lengths at {}", level.name());
    for (index, (fast, oracle)) in fast.iter().zip(oracle).enumerate() {
        assert!(
            fast.bits() == oracle.bits(),
            "at {}, element {index}: {fast:?} ({:#x}), but the oracle says {oracle:?} ({:#x})",
            level.name(),
            fast.bits(),
            oracle.bits(),
        );
    }
}

/// Asserts equal bits but for NaN, whose payload arithmetic leaves to the CPU.
#[track_caller]
fn assert_same<T: Real>(level: Level, fast: &[T], oracle: &[T]) {
    let canonical = |values: &[T]| -> Vec<T> {
        values.iter().map(|&value| if value.is_nan() { T::NAN } else { value }).collect()
    };
    assert_bits(level, &canonical(fast), &canonical(oracle));
}

/// The bytes behind one more byte, so that they are misaligned for any type.
fn misaligned(bytes: &[u8]) -> Vec<u8> {
    [&[0xA5], bytes].concat()
}
