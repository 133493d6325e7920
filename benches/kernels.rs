//! How fast the kernels are, one by one; the first lines are a memcpy, to hold them against.
//!
//! `cargo bench --bench kernels [-- FILTER]` prints a line per kernel, type and level. Without
//! `--bench` (as `cargo test --benches` runs it) everything runs once, to see that it does.
//!
//! "cache" is a piece of 4 Ki elements, over and over; "memory" is arrays of 256 MiB each. The best
//! of several rounds counts, since other programs can only make a round slower.

#![expect(clippy::print_stdout, reason = "a benchmark prints its results")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use oxmerge::dtype::DType;
use oxmerge::kernels::{
    BLOCK, BinaryOp, CELL, LANES, Level, MaskKey, Operand, Real, SPAN, ThinnedTerm, UnaryOp, Votes,
    absolute_sum_into, binary, compare, count, dot_into, histogram, keep, masked, max_into, narrow,
    norms_into, random_bits, random_mask, select, sum_into, thinned_sum_bytes, unary,
    weighted_difference_sum_bytes, weighted_sum, weighted_sum_bytes, widen,
};

/// Elements of a cached piece.
const PIECE: usize = 4096;

struct Bench {
    filter: String,
    quick: bool,
}

impl Bench {
    fn from_arguments() -> Self {
        let (flags, words): (Vec<_>, Vec<_>) =
            std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
        let quick = !flags.iter().any(|flag| flag == "--bench");
        Self { filter: words.into_iter().next().unwrap_or_default(), quick }
    }

    /// Bytes of an array that is too large for any cache.
    fn large(&self) -> usize {
        if self.quick { 1 << 16 } else { 256 << 20 }
    }

    /// The shortest time of one call, in seconds, of five rounds or more.
    fn time(&self, mut call: impl FnMut()) -> f64 {
        let (mut best, mut calls, mut rounds) = (f64::INFINITY, 1_u32, 0);
        let deadline = Instant::now() + Duration::from_millis(if self.quick { 0 } else { 200 });
        loop {
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            let elapsed = start.elapsed();
            best = best.min(elapsed.as_secs_f64() / f64::from(calls));
            rounds += 1;
            if Instant::now() >= deadline && (self.quick || rounds >= 5) {
                return best;
            }
            if elapsed < Duration::from_millis(2) {
                calls *= 2;
            }
        }
    }

    /// Runs and prints one case that moves `bytes` for `elements`.
    fn case(&self, name: &str, level: Level, elements: usize, bytes: usize, call: impl FnMut()) {
        let name = format!("{name} {}", level.name());
        if name.contains(&self.filter) {
            let seconds = self.time(call);
            let (rate, elements) = (bytes as f64 / seconds / 1e9, elements as f64 / seconds / 1e9);
            println!("{name:56} {rate:7.1} GB/s {elements:6.2} Gel/s");
        }
    }
}

/// Weights that look like weights: roughly bell-shaped around zero, a third exactly zero.
fn weights<T: Real>(count: usize) -> Vec<T> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f64 / f64::from(1 << 24)
    };
    (0..count)
        .map(|_| {
            let sum: f64 = (0..4).map(|_| uniform()).sum();
            if uniform() < 1.0 / 3.0 { T::ZERO } else { T::from_f64((sum - 2.0) / 50.0) }
        })
        .collect()
}

fn stored(dtype: DType, bytes: usize) -> Vec<u8> {
    let pattern = weights::<f64>(PIECE);
    let mut piece = vec![0; PIECE * dtype.size()];
    narrow(Level::detect(), &pattern, dtype, &mut piece);
    piece.iter().copied().cycle().take(bytes).collect()
}

fn conversions<T: Real>(bench: &Bench, level: Level, real: &str) {
    let mut wide = weights::<T>(PIECE);
    for dtype in [DType::Bf16, DType::F16, DType::F32, DType::F64] {
        let mut bytes = stored(dtype, PIECE * dtype.size());
        let moved = PIECE * (dtype.size() + size_of::<T>());
        if dtype.size() <= size_of::<T>() {
            bench.case(&format!("cache widen {dtype} {real}"), level, PIECE, moved, || {
                widen(level, dtype, black_box(&bytes), &mut wide);
            });
        }
        bench.case(&format!("cache narrow {dtype} {real}"), level, PIECE, moved, || {
            narrow(level, black_box(&wide), dtype, &mut bytes);
        });
    }
}

fn elementwise<T: Real>(bench: &Bench, level: Level, real: &str) {
    let (a, b, c) = (weights::<T>(PIECE), vec![T::ONE; PIECE], weights::<T>(PIECE));
    let mut out = vec![T::ZERO; PIECE];
    let size = PIECE * size_of::<T>();
    for op in [BinaryOp::Add, BinaryOp::Div, BinaryOp::Max, BinaryOp::Greater] {
        bench.case(&format!("cache {op:?} {real}"), level, PIECE, 3 * size, || {
            binary(level, op, Operand::Slice(black_box(&a)), Operand::Slice(&b), &mut out);
        });
    }
    for op in [UnaryOp::Abs, UnaryOp::Sign, UnaryOp::Sqrt, UnaryOp::Exp, UnaryOp::Ln] {
        bench.case(&format!("cache {op:?} {real}"), level, PIECE, 2 * size, || {
            unary(level, op, black_box(&a), &mut out);
        });
    }
    bench.case(&format!("cache select {real}"), level, PIECE, 4 * size, || {
        select(level, black_box(&a), Operand::Slice(&b), Operand::Slice(&c), &mut out);
    });
    let terms = [(T::ONE, &a[..]), (T::ONE, &b[..]), (T::ONE, &c[..])];
    for count in 1..=3 {
        let moved = (count + 1) * size;
        bench.case(&format!("cache weighted_sum {count} {real}"), level, PIECE, moved, || {
            weighted_sum(level, black_box(&terms[..count]), &mut out);
        });
    }
}

fn reductions<T: Real>(bench: &Bench, level: Level, real: &str) {
    let (a, b) = (weights::<T>(PIECE), weights::<T>(PIECE));
    let mut lanes = [0.0; LANES];
    let size = PIECE * size_of::<T>();
    bench.case(&format!("cache sum_into {real}"), level, PIECE, size, || {
        sum_into(level, black_box(&a), &mut lanes);
    });
    bench.case(&format!("cache absolute_sum_into {real}"), level, PIECE, size, || {
        absolute_sum_into(level, black_box(&a), &mut lanes);
    });
    bench.case(&format!("cache max_into {real}"), level, PIECE, size, || {
        max_into(level, black_box(&a), &mut lanes);
    });
    bench.case(&format!("cache dot_into {real}"), level, PIECE, 2 * size, || {
        dot_into(level, black_box(&a), &b, &mut lanes);
    });
}

fn order<T: Real>(bench: &Bench, level: Level, real: &str) {
    let a: Vec<T> = weights::<T>(PIECE).into_iter().map(T::abs).collect();
    let size = PIECE * size_of::<T>();
    let mut out = vec![T::ZERO; PIECE];
    let mut bins = vec![0; 1 << 16];
    let (zero, most) = (T::ZERO.key(), u64::MAX >> (64 - 8 * size_of::<T>()));
    let shift = 64 - (most - zero).leading_zeros() - 16;
    let median = T::from_f64(0.01).key();
    bench.case(&format!("cache histogram of all {real}"), level, PIECE, size, || {
        bins.fill_with_zero_rarely();
        histogram(level, black_box(&a), zero, most, shift, &mut bins);
    });
    bench.case(&format!("cache histogram of half {real}"), level, PIECE, size, || {
        bins.fill_with_zero_rarely();
        histogram(level, black_box(&a), median, most, shift, &mut bins);
    });
    bench.case(&format!("cache histogram of a bin {real}"), level, PIECE, size, || {
        bins.fill_with_zero_rarely();
        histogram(
            level,
            black_box(&a),
            median,
            median + (1 << shift) - 1,
            shift.saturating_sub(16),
            &mut bins,
        );
    });
    bench.case(&format!("cache count {real}"), level, PIECE, size, || {
        black_box(count(level, black_box(&a), median, median + 1000));
    });
    bench.case(&format!("cache keep {real}"), level, PIECE, 2 * size, || {
        keep(level, black_box(&a), median, true, &mut out);
    });
    let key = MaskKey::new(1, "bench", 0);
    bench.case(&format!("cache random_mask {real}"), level, PIECE, size, || {
        random_mask(level, black_box(&key), 0, 1 << 31, &mut out);
    });
    let mask = random_bits(level, &key, 0, 1 << 31);
    let (values, kept) = (&a[..SPAN], &mut out[..SPAN]);
    bench.case(&format!("cache masked {real}"), level, SPAN, 2 * SPAN * size_of::<T>(), || {
        masked(level, black_box(&mask), T::ONE, values, kept);
    });
}

/// Bins overflow in long runs; emptying them each time would be measured too.
trait Bins {
    fn fill_with_zero_rarely(&mut self);
}

impl Bins for Vec<u32> {
    fn fill_with_zero_rarely(&mut self) {
        if self[0] > 1 << 30 || self[self.len() / 2] > 1 << 30 {
            self.fill(0);
        }
    }
}

fn fused(bench: &Bench, level: Level) {
    for (place, bytes) in [("cache", 2 * PIECE), ("memory", bench.large())] {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let inputs: Vec<_> = (0..4).map(|_| stored(dtype, bytes)).collect();
            let mut out = vec![1; bytes];
            let elements = bytes / dtype.size();
            let terms: Vec<_> = inputs.iter().map(|input| (0.25, dtype, &input[..])).collect();
            for count in 1..=4 {
                let name = format!("{place} weighted_sum_bytes {count} {dtype}");
                bench.case(&name, level, elements, (count + 1) * bytes, || {
                    weighted_sum_bytes(level, black_box(&terms[..count]), dtype, &mut out);
                });
            }
            let base = (dtype, &inputs[3][..]);
            for count in 1..=3 {
                let name = format!("{place} weighted_difference_sum_bytes {count} {dtype}");
                bench.case(&name, level, elements, (count + 2) * bytes, || {
                    let terms = black_box(&terms[..count]);
                    weighted_difference_sum_bytes(level, base, terms, 0.5, dtype, &mut out);
                });
            }
        }
    }
}

fn copies(bench: &Bench, level: Level) {
    for (place, bytes) in [("cache", 2 * PIECE), ("memory", bench.large())] {
        // Both written before, or the first copy would wait for pages.
        let (source, mut target) = (vec![1_u8; bytes], vec![2_u8; bytes]);
        bench.case(&format!("{place} memcpy"), level, bytes / 2, 2 * bytes, || {
            black_box(&mut target).copy_from_slice(black_box(&source));
        });
    }
}

fn masks(bench: &Bench, level: Level) {
    let key = MaskKey::new(1, "bench", 0);
    bench.case("cache random_bits", level, SPAN, SPAN / 8, || {
        black_box(random_bits(level, black_box(&key), 0, 1 << 31));
    });
    let bits = random_bits(level, &key, 0, 1 << 31);
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let [x, base] = [stored(dtype, SPAN * dtype.size()), stored(dtype, SPAN * dtype.size())];
        let mut lanes = [[0.0; LANES]; 2];
        bench.case(&format!("cache norms {dtype}"), level, SPAN, x.len() + base.len(), || {
            norms_into(level, dtype, black_box(&x), &base, &bits, &mut lanes);
        });
        let term = ThinnedTerm { weight: 0.5, scale: 2.0, input: &x, bits: &bits };
        let (terms, mut out) = ([term, term], base.clone());
        let bytes = 3 * x.len();
        bench.case(&format!("cache thinned_sum_bytes 2 {dtype}"), level, SPAN, bytes, || {
            let terms = black_box(&terms);
            thinned_sum_bytes(level, dtype, &base, terms, Votes::Elect, 1.0, &mut out);
        });
    }
}

/// What a digest takes: a hash, and a comparison with what was there.
fn digests(bench: &Bench, level: Level) {
    for dtype in [DType::Bf16, DType::F16, DType::F32, DType::F64] {
        let out = stored(dtype, CELL * dtype.size());
        let mut reference = out.clone();
        reference.rotate_left(dtype.size());
        bench.case(&format!("cache compare {dtype}"), level, CELL, 2 * out.len(), || {
            black_box(compare(level, dtype, black_box(&out), Some(&reference)));
        });
    }
}

fn main() {
    let bench = Bench::from_arguments();
    copies(&bench, Level::detect());
    let piece = stored(DType::Bf16, 2 * BLOCK);
    bench.case("cache blake3", Level::detect(), BLOCK, piece.len(), || {
        black_box(blake3::hash(black_box(&piece)));
    });
    for level in Level::available() {
        conversions::<f32>(&bench, level, "f32");
        conversions::<f64>(&bench, level, "f64");
        elementwise::<f32>(&bench, level, "f32");
        elementwise::<f64>(&bench, level, "f64");
        reductions::<f32>(&bench, level, "f32");
        reductions::<f64>(&bench, level, "f64");
        order::<f32>(&bench, level, "f32");
        order::<f64>(&bench, level, "f64");
        fused(&bench, level);
        masks(&bench, level);
        digests(&bench, level);
    }
}
