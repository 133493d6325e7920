use super::{config, each_level};
use oxmerge::kernels::{Level, MaskKey, Picked, Ranker, Real, draws, oracle, ordinals};
use proptest::prelude::*;

/// What is kept of `stride` vectors that lie interleaved.
#[track_caller]
fn assert_picked<T: Real>(
    ranker: &mut Ranker<T::Ordinal>,
    level: Level,
    values: &[T],
    stride: usize,
) {
    let mut all = vec![T::ZERO.ordinal(); values.len()];
    ordinals(level, values, &mut all);
    let mut drawn = vec![0; values.len()];
    draws(level, &MaskKey::new(7, "t", 0), 0, &mut drawn);
    // Where bounds are the least and the greatest there are, so are some draws.
    drawn.iter_mut().step_by(5).for_each(|draw| *draw = 0);
    drawn.iter_mut().skip(1).step_by(5).for_each(|draw| *draw = u32::MAX);
    let chances = [(0.35, 0.65), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.9, 0.2)];
    let random = chances.map(|(lowest, highest)| Picked::Random { lowest, highest, draws: &drawn });
    let length = values.len().div_ceil(stride) as u64;
    let counts = [0, 1, length / 3, length / 2 + 1, length, u64::MAX].map(Picked::Largest);
    for picked in random.into_iter().chain(counts) {
        let mut fast = vec![7; values.len()];
        ranker.pick(&all, stride, picked, &mut fast);
        for first in 0..stride.min(values.len()) {
            let own: Vec<T> = values[first..].iter().step_by(stride).copied().collect();
            let drawn: Vec<u32> = drawn[first..].iter().step_by(stride).copied().collect();
            let picked = match picked {
                Picked::Random { lowest, highest, .. } => {
                    Picked::Random { lowest, highest, draws: &drawn }
                }
                largest @ Picked::Largest(_) => largest,
            };
            let fast: Vec<u8> = fast[first..].iter().step_by(stride).copied().collect();
            let what = format!("{picked:?} of vector {first} of {} at {}", own.len(), level.name());
            assert!(fast == oracle::kept_by_rank(&own, picked), "{}", &what[..80.min(what.len())]);
        }
    }
}

each_level! {
    fn what_is_kept_is_what_a_sort_keeps<T>(level) {
        let stride = prop_oneof![Just(1), 1..9_usize];
        proptest!(config(48), |(values in T::slice(), stride in stride)| {
            assert_picked(&mut Ranker::new(level), level, &values, stride);
        });
    }

    /// Differences of stored weights: on a grid, many equal, many zero.
    fn of_long_vectors_of_differences_too<T>(level) {
        let mut ranker = Ranker::new(level);
        for length in [31, 32, 33, 511, 512, 2048, 5632, 20_011] {
            let step = |at: usize| ((at * at + 3 * at) % 1009 % 41) as f64 * 2_f64.powi(-9 - (at % 7) as i32);
            let grid: Vec<T> = (0..length).map(|at| T::from_f64(step(at))).collect();
            assert_picked(&mut ranker, level, &grid, 1);
            // Bits below those of a bin, at first in some elements, then in all.
            let some: Vec<T> = grid.iter().enumerate().map(|(at, &value)| {
                if at % 50 == 3 { value + T::from_f64(at as f64 * 1e-7) } else { value }
            }).collect();
            assert_picked(&mut ranker, level, &some, 1);
            let all: Vec<T> = grid.iter().enumerate().map(|(at, &value)| {
                value + T::from_f64((at % 997) as f64 * 1e-6)
            }).collect();
            assert_picked(&mut ranker, level, &all, 1);
            assert_picked(&mut ranker, level, &vec![T::from_f64(0.3); length], 1);
            // One element dwarfs the others, which then share a bin.
            for giant in [T::from_f64(1e30), T::NAN] {
                let mut values = all.clone();
                values[length / 2] = giant;
                assert_picked(&mut ranker, level, &values, 1);
            }
        }
    }
}
