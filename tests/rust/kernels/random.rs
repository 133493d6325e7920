use super::{LENGTHS, config, each_level};
use oxmerge::kernels::random::philox4x32;
use oxmerge::kernels::{GENERATOR_VERSION, Level, MaskKey, Real, oracle, random_mask};
use proptest::prelude::*;

fn mask<T: Real>(level: Level, key: &MaskKey, first: u64, keep_below: u64, count: usize) -> Vec<T> {
    let mut out = vec![T::NAN; count];
    random_mask(level, key, first, keep_below, &mut out);
    out
}

fn mask_oracle<T: Real>(key: &MaskKey, first: u64, keep_below: u64, count: usize) -> Vec<T> {
    let keeps = |index: u64| u64::from(oracle::draw(key, index)) < keep_below;
    (first..first + count as u64).map(|index| T::truth(keeps(index))).collect()
}

/// The vectors that the generator's authors publish.
#[test]
fn philox_gives_the_published_words() {
    let vectors = [
        ([0; 2], [0; 4], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
        ([u32::MAX; 2], [u32::MAX; 4], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]),
        (
            [0xA409_3822, 0x299F_31D0],
            [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1],
        ),
    ];
    for (key, counter, words) in vectors {
        assert_eq!(philox4x32(key, counter), words, "of key {key:x?}, counter {counter:x?}");
        assert_eq!(oracle::philox4x32(key, counter), words, "the oracle");
    }
}

each_level! {
    fn masks_are_like_the_oracle<T>(level) {
        let first = prop_oneof![0..100_u64, any::<u32>().prop_map(u64::from), 0..1_u64 << 60];
        let bound = prop_oneof![Just(0), Just(1), Just(1 << 32), 0..1_u64 << 32];
        let length = prop_oneof![prop::sample::select(&LENGTHS[..]), 0..300_usize];
        proptest!(config(64), |(seed in any::<u64>(), first in first, bound in bound, n in length)| {
            let key = MaskKey::new(seed, "model.layers.0.mlp.up_proj.weight", 1);
            prop_assert_eq!(mask::<T>(level, &key, first, bound, n), mask_oracle(&key, first, bound, n));
        });
    }

    /// Whatever the ranges, an element's draw is the same; also where the counter's low word wraps.
    fn ranges_join<T>(level) {
        let key = MaskKey::new(9, "a", 0);
        let first = (8 << 32) - 2500;
        let bound = (1 << 31) + 12_345;
        let whole: Vec<T> = mask(level, &key, first, bound, 5000);
        let mut joined = Vec::new();
        for length in [1, 2, 3, 15, 16, 17, 127, 128, 129, 2047, 2048, 467] {
            let start = first + joined.len() as u64;
            joined.extend(mask::<T>(level, &key, start, bound, length));
        }
        assert_eq!(whole, joined, "at {}", level.name());
        assert_eq!(whole, mask_oracle(&key, first, bound, 5000), "at {}", level.name());
    }
}

#[test]
fn keys_differ_by_seed_name_and_position() {
    let keys = [
        MaskKey::new(0, "a", 0),
        MaskKey::new(1, "a", 0),
        MaskKey::new(0, "b", 0),
        MaskKey::new(0, "a", 1),
        MaskKey::new(0, "a\0", 0),
        MaskKey::new(1 << 32, "a", 0),
    ];
    for (index, key) in keys.iter().enumerate() {
        assert!(!keys[..index].contains(key), "key {index} is taken");
    }
}

/// A golden mask: if this changes, so must the version.
#[test]
fn version_two_stays_as_it_is() {
    assert_eq!(GENERATOR_VERSION, 2, "a new version needs a new golden mask");
    let key = MaskKey::new(42, "lm_head.weight", 2);
    let bits = mask::<f32>(Level::portable(), &key, 0, 1 << 31, 32)
        .iter()
        .fold(0_u32, |bits, &value| bits << 1 | u32::from(value > 0.0));
    assert_eq!(
        (key.counter(0), bits),
        ([0, 0, 0xCA39_0574, 0x9CF9_BD32], 0xBBE2_BA4D),
        "the mask of version 2 changed"
    );
}

/// The low half of a draw is only looked at where the high half ties with the bound's, so bounds are
/// put just above and just below the draws of elements.
#[test]
fn ties_are_decided_by_the_low_half() {
    let key = MaskKey::new(5, "x", 1);
    for element in [0, 15, 16, 127, 128, 1000, 2047] {
        let draw = u64::from(oracle::draw(&key, element));
        for bound in [draw - 1, draw, draw + 1, draw | 0xFFFF, draw & !0xFFFF] {
            for level in Level::available() {
                let kept = mask::<f32>(level, &key, 0, bound, 2048);
                assert_eq!(kept[element as usize] == 1.0, draw < bound, "{element}, {bound}");
                assert_eq!(kept, mask_oracle::<f32>(&key, 0, bound, 2048), "at {}", level.name());
            }
        }
    }
}

#[test]
fn density_is_kept() {
    let key = MaskKey::new(3, "x", 0);
    let kept: f32 = mask::<f32>(Level::detect(), &key, 0, (1 << 32) / 5, 100_000).iter().sum();
    assert!((kept / 100_000.0 - 0.2).abs() < 0.01, "kept {kept} of 100000 at density 0.2");
}
