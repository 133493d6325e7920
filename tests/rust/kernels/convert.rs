use super::{TestReal, assert_bits, assert_same, config, each_level, misaligned};
use oxmerge::dtype::DType;
use oxmerge::kernels::{Level, Real, narrow, oracle, widen};
use proptest::prelude::*;

const HALVES: [DType; 2] = [DType::Bf16, DType::F16];
const FLOATS: [DType; 4] = [DType::Bf16, DType::F16, DType::F32, DType::F64];

fn widen_oracle<T: Real>(dtype: DType, bytes: &[u8]) -> Vec<T> {
    bytes.chunks(dtype.size()).map(|element| oracle::widen(dtype, element)).collect()
}

fn narrow_oracle<T: Real>(dtype: DType, values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|&value| oracle::narrow(dtype, value)).collect()
}

/// Widens from a misaligned address.
fn widened<T: Real>(level: Level, dtype: DType, bytes: &[u8]) -> Vec<T> {
    let mut wide = vec![T::ZERO; bytes.len() / dtype.size()];
    widen(level, dtype, &misaligned(bytes)[1..], &mut wide);
    wide
}

/// Narrows to a misaligned address.
fn narrowed<T: Real>(level: Level, dtype: DType, values: &[T]) -> Vec<u8> {
    let mut bytes = vec![0xA5; 1 + values.len() * dtype.size()];
    narrow(level, values, dtype, &mut bytes[1..]);
    assert_eq!(bytes[0], 0xA5, "wrote before the slice");
    bytes.split_off(1)
}

#[track_caller]
fn assert_narrows<T: Real>(level: Level, dtype: DType, values: &[T], expected: &[u8]) {
    let bytes = narrowed(level, dtype, values);
    let size = dtype.size();
    for (index, value) in values.iter().enumerate() {
        let element = index * size..(index + 1) * size;
        assert!(
            bytes[element.clone()] == expected[element.clone()],
            "at {}, {value:?} ({:#x}) to {dtype}: {:x?}, but the oracle says {:x?}",
            level.name(),
            value.bits(),
            &bytes[element.clone()],
            &expected[element],
        );
    }
}

/// Each 16-bit pattern, the ties between neighbours, and the working type's values beside both.
fn around_every_boundary<T: TestReal>(dtype: DType) -> Vec<T> {
    let value = |pattern: u16| oracle::widen::<f64>(dtype, &pattern.to_le_bytes());
    let mut values = Vec::new();
    for pattern in 0..0x7FFF_u16 {
        let (low, high) = (value(pattern), value(pattern + 1));
        // Above the greatest finite value, the tie is where it would be with one more exponent.
        let tie = if high.is_finite() {
            low.midpoint(high)
        } else {
            low + (low - value(pattern - 1)) / 2.0
        };
        for value in [low, tie] {
            let bits = T::from_f64(value).bits();
            for neighbour in [bits.saturating_sub(1), bits, bits + 1] {
                let value = T::from_pattern(neighbour);
                values.extend([value, -value]);
            }
        }
    }
    values
}

each_level! {
    fn widens_every_16_bit_pattern<T>(level) {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in HALVES {
            let expected: Vec<T> = widen_oracle(dtype, &bytes);
            assert_same(level, &widened(level, dtype, &bytes), &expected);
        }
    }

    fn narrowing_returns_every_16_bit_pattern<T>(level) {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in HALVES {
            let wide: Vec<T> = widened(level, dtype, &bytes);
            assert_narrows(level, dtype, &wide, &narrow_oracle(dtype, &wide));
        }
    }

    fn narrows_right_around_every_16_bit_boundary<T>(level) {
        for dtype in HALVES {
            let values = around_every_boundary::<T>(dtype);
            assert_narrows(level, dtype, &values, &narrow_oracle(dtype, &values));
        }
    }

    fn narrows_anything_like_the_oracle<T>(level) {
        proptest!(config(64), |(values in T::slice())| {
            for dtype in FLOATS {
                assert_narrows(level, dtype, &values, &narrow_oracle(dtype, &values));
            }
        });
    }

    fn widens_anything_like_the_oracle<T>(level) {
        proptest!(config(64), |(bytes in prop::collection::vec(any::<u8>(), 0..2000))| {
            for dtype in FLOATS.into_iter().filter(|dtype| dtype.size() <= size_of::<T>()) {
                let bytes = &bytes[..bytes.len() / dtype.size() * dtype.size()];
                let expected: Vec<T> = widen_oracle(dtype, bytes);
                assert_same(level, &widened(level, dtype, bytes), &expected);
            }
        });
    }

    fn every_nan_narrows_to_one_pattern<T>(level) {
        let patterns: [(DType, &[u8]); 4] = [
            (DType::Bf16, &[0xC0, 0x7F]),
            (DType::F16, &[0x00, 0x7E]),
            (DType::F32, &[0x00, 0x00, 0xC0, 0x7F]),
            (DType::F64, &[0, 0, 0, 0, 0, 0, 0xF8, 0x7F]),
        ];
        let infinity = T::from_f64(f64::INFINITY).bits();
        for (dtype, pattern) in patterns {
            for payload in [1, 2, 1 << 12, (1 << 22) | 1, 1 << 21] {
                let value = T::from_pattern(infinity + payload);
                let expected = pattern.repeat(2);
                assert_narrows(level, dtype, &[value, -value], &expected);
            }
        }
    }
}

/// Halfway between two f32, and the doubles beside: the first rounding must not decide a tie.
#[test]
fn narrows_f64_to_f32_at_ties() {
    for level in Level::available() {
        proptest!(config(64), |(bits in prop::collection::vec(0..0x7F80_0000_u32, 1..200))| {
            let tie = |bits| {
                let (low, high) = (f32::from_bits(bits), f32::from_bits(bits + 1));
                if high.is_finite() { f64::from(low).midpoint(high.into()) } else { f64::from(low) }
            };
            let values: Vec<f64> = bits
                .into_iter()
                .map(tie)
                .flat_map(|tie| [tie.next_down(), tie, tie.next_up(), -tie])
                .collect();
            assert_narrows(level, DType::F32, &values, &narrow_oracle(DType::F32, &values));
        });
    }
}

/// Rounding to f32 first would make the tie of bf16, and give an even result below the value.
#[test]
fn narrows_f64_directly() {
    let just_above_tie = 1.0 + 2_f64.powi(-8) + 2_f64.powi(-40);
    for level in Level::available() {
        assert_eq!(narrowed(level, DType::Bf16, &[just_above_tie]), [0x81, 0x3F], "rounded twice");
    }
}

/// A second opinion on the oracle itself, by code that is not ours.
#[test]
fn the_oracle_agrees_with_the_half_crate() {
    for pattern in 0..=u16::MAX {
        let bytes = pattern.to_le_bytes();
        let bf16: f32 = oracle::widen(DType::Bf16, &bytes);
        let f16: f32 = oracle::widen(DType::F16, &bytes);
        let half =
            [half::bf16::from_bits(pattern).to_f32(), half::f16::from_bits(pattern).to_f32()];
        assert_same(Level::portable(), &[bf16, f16], &half);
    }
    let values = around_every_boundary::<f32>(DType::F16)
        .into_iter()
        .chain(around_every_boundary(DType::Bf16))
        .filter(|value| !value.is_nan());
    for value in values {
        let half = half::bf16::from_f32(value).to_le_bytes();
        assert_eq!(oracle::narrow(DType::Bf16, value), half, "{value:?} to BF16");
        let half = half::f16::from_f32(value).to_le_bytes();
        assert_eq!(oracle::narrow(DType::F16, value), half, "{value:?} to F16");
    }
}

#[test]
#[should_panic(expected = "F64 does not widen to f32")]
fn f64_does_not_fit_f32() {
    widen(Level::portable(), DType::F64, &[0; 8], &mut [0.0_f32]);
}

#[test]
#[should_panic(expected = "must be a float type")]
fn integers_do_not_widen() {
    widen(Level::portable(), DType::I32, &[0; 4], &mut [0.0_f32]);
}

#[test]
#[should_panic(expected = "bytes of 2 elements")]
fn lengths_must_agree() {
    narrow(Level::portable(), &[1.0_f32, 2.0], DType::Bf16, &mut [0; 3]);
}

#[test]
fn widening_to_the_same_type_keeps_bits() {
    for level in Level::available() {
        let values: Vec<f32> =
            f32::specials().into_iter().filter(|value| !value.is_nan()).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_bits(level, &widened(level, DType::F32, &bytes), &values);
    }
}
