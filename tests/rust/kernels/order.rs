use super::{TestReal, assert_same, config, each_level};
use oxmerge::dtype::DType;
use oxmerge::kernels::{
    Counts, Cuts, Ends, Level, Real, SPAN, bracket, collect, collect_magnitudes, count, histogram,
    keep, mark_largest, narrow, oracle, trim, widen,
};
use proptest::prelude::*;

/// A generator for whole arrays, where proptest would be slow.
fn values<T: TestReal>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state >> 33
    };
    let specials = T::specials();
    (0..count)
        .map(|_| match random() % 4 {
            0 => T::ZERO,
            1 => specials[random() as usize % specials.len()],
            _ => T::from_f64((random() % 4096) as f64 / 1024.0 - 2.0),
        })
        .collect()
}

/// Intervals whose ends are keys of values, shifted a little.
fn interval<T: TestReal>() -> impl Strategy<Value = (u64, u64)> {
    let end = (T::interesting(), 0..4_u64).prop_map(|(value, shift)| {
        let most = u64::MAX >> (64 - 8 * size_of::<T>());
        oracle::key(value).saturating_add(1).saturating_sub(shift).min(most)
    });
    (end.clone(), end).prop_map(|(a, b)| (a.min(b), a.max(b)))
}

fn assert_histogram<T: TestReal>(
    level: Level,
    values: &[T],
    (low, high): (u64, u64),
    resolution: u32,
) {
    let width = 64 - (high - low).leading_zeros();
    let shift = width.saturating_sub(resolution);
    let bins = ((high - low) >> shift) as usize + 1;
    let (mut fast, mut slow) = (vec![3; bins], vec![3; bins]);
    let counts = histogram(level, values, low, high, shift, &mut fast);
    let expected = oracle::histogram(values, low, high, shift, &mut slow);
    assert_eq!(counts, expected, "counts at {} in {low:#x}..={high:#x}", level.name());
    assert_eq!(fast, slow, "bins at {} in {low:#x}..={high:#x}", level.name());
    assert_eq!(count(level, values, low, high), expected, "count at {}", level.name());
}

fn assert_collected<T: TestReal>(
    level: Level,
    values: &[T],
    (low, high): (u64, u64),
    resolution: u32,
) {
    let width = 64 - (high - low).leading_zeros();
    let shift = width.saturating_sub(resolution);
    let keys: Vec<u64> = values.iter().map(|&value| oracle::key(value)).collect();
    let count = |is: &dyn Fn(u64) -> bool| keys.iter().filter(|&&key| is(key)).count() as u64;
    let expected = Ends {
        above: count(&|key| key > high),
        high: count(&|key| key == high),
        low: if low == high { 0 } else { count(&|key| key == low) },
    };
    let mut between = vec![7];
    let ends = collect(level, values, low, high, shift, &mut between);
    assert_eq!(ends, expected, "at {} in {low:#x}..={high:#x}", level.name());
    let inside = keys.iter().filter(|&&key| low < key && key < high);
    let offsets = inside.map(|key| ((key - low) >> shift) as u32);
    let expected: Vec<u32> = [7].into_iter().chain(offsets).collect();
    assert_eq!(between, expected, "between at {} in {low:#x}..={high:#x}", level.name());
}

/// What is asked of a stored task vector is what is asked of its magnitudes.
#[test]
fn magnitudes_of_a_stored_task_vector() {
    let everything = (0, u64::from(u32::MAX));
    for level in Level::available() {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            for count in [SPAN, SPAN - 1, 33, 1, 0] {
                let stored = |seed| {
                    let mut bytes = vec![0; count * dtype.size()];
                    narrow(level, &values::<f32>(count, seed), dtype, &mut bytes);
                    let mut wide = vec![0.0_f32; count];
                    widen(level, dtype, &bytes, &mut wide);
                    (bytes, wide)
                };
                let ((x, wide), (base, wide_base)) = (stored(3), stored(4));
                let magnitudes: Vec<f32> =
                    wide.iter().zip(&wide_base).map(|(x, base)| (x - base).abs()).collect();
                let some_key =
                    magnitudes.get(count / 2).map_or(1 << 31, |&value| oracle::key(value));
                let above = (some_key, u64::from(u32::MAX));
                for (low, high) in [everything, above, (some_key, some_key)] {
                    let (mut fast, mut slow) = (Vec::new(), Vec::new());
                    let ends = collect_magnitudes(level, dtype, &x, &base, low, high, 0, &mut fast);
                    assert_eq!(ends, collect(level, &magnitudes, low, high, 0, &mut slow));
                    assert_eq!(fast, slow, "{dtype} at {}", level.name());
                }
                brackets(level, dtype, [&x, &base], &magnitudes, some_key);
                for equals_end in [0, 1, count / 2 + 1, count, SPAN] {
                    let bits = mark_largest(level, dtype, &x, &base, some_key, equals_end);
                    for (at, &magnitude) in magnitudes.iter().enumerate() {
                        let row = bits.len();
                        let bit = bits[at % row] & (1 << (at / row)) != 0;
                        let kept = oracle::is_kept(magnitude, some_key, at < equals_end);
                        assert_eq!(bit, kept, "{magnitude} at {at} of {dtype}, {}", level.name());
                    }
                }
            }
        }
    }
}

/// What lies above two cuts and between them is what the oracle keeps, key by key.
fn brackets(level: Level, dtype: DType, [x, base]: [&[u8]; 2], values: &[f32], key: u64) {
    let count = values.len();
    let (nan, zero) = (u64::from(u32::MAX), 1 << 31);
    let cuts = [(key, zero), (key, key), (key + 1, key), (nan, key), (nan, 0), (nan, nan)];
    let places = [0, 1, count / 2 + 1, SPAN];
    for ((high, low), first) in cuts.into_iter().flat_map(|cut| places.map(|end| (cut, end))) {
        for second in places.into_iter().filter(|&end| high > low || end >= first) {
            let (mut between, mut keys, mut slow) = (vec![0; count], vec![7], vec![7]);
            let cuts = Cuts { high, low, ends: [first, second] };
            let (kept, ends) = bracket(level, dtype, x, base, cuts, &mut between, &mut keys);
            let all = collect(level, values, low, high, 0, &mut slow);
            assert_eq!(ends, all, "{dtype} {high:#x} {low:#x} {}", level.name());
            assert_eq!(keys, slow, "{dtype} {high:#x} {low:#x} {}", level.name());
            for (at, &value) in values.iter().enumerate() {
                let row = kept.len();
                let is_kept = oracle::is_kept(value, high, at < first);
                let may_be = oracle::is_kept(value, low, at < second);
                assert_eq!(kept[at % row] & (1 << (at / row)) != 0, is_kept, "{value} at {at}");
                assert_eq!(between[at] == 1, may_be && !is_kept, "{value} at {at} of {count}");
            }
        }
    }
}

each_level! {
    fn keys_order_as_values<T>(_level) {
        let mut specials = T::specials();
        specials.sort_by_key(|value| value.key());
        for pair in specials.windows(2) {
            let ordered = pair[0] <= pair[1] || pair[1].is_nan();
            assert!(ordered, "the keys put {:?} before {:?}", pair[0], pair[1]);
            let equal = pair[0] == pair[1] || (pair[0].is_nan() && pair[1].is_nan());
            assert_eq!(pair[0].key() == pair[1].key(), equal, "{:?} and {:?}", pair[0], pair[1]);
        }
        proptest!(config(256), |(value in T::interesting())| {
            prop_assert_eq!(value.key(), oracle::key(value), "the key of {:?}", value);
        });
    }

    fn histograms_are_like_the_oracle<T>(level) {
        proptest!(config(64), |(values in T::slice(), interval in interval::<T>(), bits in 1..17_u32)| {
            assert_histogram(level, &values, interval, bits);
        });
    }

    fn histograms_of_everything_are_like_the_oracle<T>(level) {
        let most = u64::MAX >> (64 - 8 * size_of::<T>());
        for bits in [1, 3, 6, 11, 16] {
            assert_histogram(level, &values::<T>(4095, 7), (0, most), bits);
            assert_histogram(level, &values::<T>(4095, 8), (most / 2, most), bits);
            assert_histogram(level, &values::<T>(640, 9), (most / 2 + 1, most / 2 + 1), bits);
        }
    }

    fn what_is_collected_is_like_the_oracle<T>(level) {
        proptest!(config(64), |(values in T::slice(), interval in interval::<T>(), bits in 1..33_u32)| {
            assert_collected(level, &values, interval, bits);
        });
        let most = u64::MAX >> (64 - 8 * size_of::<T>());
        assert_collected(level, &values::<T>(4095, 7), (0, most), 32);
        assert_collected(level, &values::<T>(4095, 8), (most / 2 + 1, most), 32);
    }

    fn an_end_beyond_all_keys_is_the_last_key<T>(level) {
        let values: Vec<T> = values(500, 1);
        let counts = count(level, &values, 0, u64::MAX);
        assert_eq!(counts, Counts { above: 0, inside: 500 }, "at {}", level.name());
    }

    fn keep_and_trim_are_like_the_oracle<T>(level) {
        let case = (T::slice(), any::<prop::sample::Index>(), any::<bool>());
        proptest!(config(96), |((values, pick, equals) in case)| {
            prop_assume!(!values.is_empty());
            let threshold = oracle::key(*pick.get(&values));
            let mut fast = vec![T::NAN; values.len()];
            keep(level, &values, threshold, equals, &mut fast);
            let kept = |value: T| oracle::is_kept(value, threshold, equals);
            let slow: Vec<T> = values.iter().map(|&value| T::truth(kept(value))).collect();
            prop_assert_eq!(fast, slow, "at {}", level.name());
            let mut fast = vec![T::NAN; values.len()];
            trim(level, &values, threshold, equals, &mut fast);
            let slow: Vec<T> =
                values.iter().map(|&v| if kept(v.abs()) { v } else { T::ZERO }).collect();
            assert_same(level, &fast, &slow);
        });
    }

    /// What the kernels are for: the k largest, of equal ones those with the lowest index.
    fn histogram_and_keep_find_the_largest<T>(level) {
        let values: Vec<T> = values(1000, 42);
        let mut sorted: Vec<usize> = (0..values.len()).collect();
        sorted.sort_by_key(|&index| std::cmp::Reverse(oracle::key(values[index])));
        for k in [1, 2, 10, 250, 500, 999, 1000] {
            let (threshold, above) = kth_key(level, &values, k as u64);
            // Equal elements are kept up to an index: two slices, as the engine would.
            let equals = (0..values.len()).filter(|&at| oracle::key(values[at]) == threshold);
            let last = equals.take(k - above as usize).last().unwrap();
            let mut mask = vec![T::NAN; values.len()];
            let (mask_first, mask_second) = mask.split_at_mut(last + 1);
            keep(level, &values[..=last], threshold, true, mask_first);
            keep(level, &values[last + 1..], threshold, false, mask_second);
            let mut expected = vec![T::ZERO; values.len()];
            sorted[..k].iter().for_each(|&index| expected[index] = T::ONE);
            assert_eq!(mask, expected, "the {k} largest at {}", level.name());
        }
    }
}

/// The k-th greatest key and how many are above it, by histograms of ever finer bins.
fn kth_key<T: Real>(level: Level, values: &[T], k: u64) -> (u64, u64) {
    let (mut low, mut high) = (0, u64::MAX >> (64 - 8 * size_of::<T>()));
    let mut bins = vec![0; 256];
    loop {
        let shift = (64 - (high - low).leading_zeros()).saturating_sub(8);
        bins.fill(0);
        let mut above = histogram(level, values, low, high, shift, &mut bins).above;
        let bin = (0..256).rev().find(|&bin| {
            let reached = above + u64::from(bins[bin]) >= k;
            above += if reached { 0 } else { u64::from(bins[bin]) };
            reached
        });
        low += (bin.expect("k values") as u64) << shift;
        if shift == 0 {
            return (low, above);
        }
        high = high.min(low.saturating_add((1 << shift) - 1));
    }
}

#[test]
#[should_panic(expected = "bin 15 is missing")]
fn bins_must_cover_the_interval() {
    histogram(Level::portable(), &[1.0_f32], 0, 255, 4, &mut [0; 15]);
}
