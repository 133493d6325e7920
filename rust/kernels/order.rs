//! Exact order statistics without sorting: counting, histograms, and keeping the largest.
//!
//! The k-th largest of a billion numbers needs no sort, only their bits: a float's magnitude orders
//! as an unsigned integer does, so with the sign applied every value has an integer key
//! ([`Real::key`]) that orders as the value. A histogram of the keys' high bits finds the bin that
//! holds the k-th; histograms of that bin, ever finer, find the key itself. Or an interval is
//! guessed from a sample, and one count proves that it holds the k-th.
//!
//! A histogram's increments cannot be vectorised, but all around them can:
//!
//! 1. Tests and bin indices of 64 elements are computed together, into arrays.
//! 2. Where none of them lies inside the interval, which is the rule once it is narrow, the rest
//!    is skipped.
//! 3. There is no branch per element. One outside the interval adds 0 to a bin that its position
//!    chooses, so that neighbours do not wait for each other's store.
//!    Where memory allows, an interval from a sample is so narrow that few elements lie in it, and
//!    those are kept instead of counted: then no further pass is needed ([`collect`]).
//! 4. Zeros are counted apart. Differences of bf16 weights are zero in up to a third of the
//!    places, and adding to the same bin over and over would wait for the previous store.

use super::convert::{Bf16, F16, F32, Format, check_bytes};
use super::level::{Kernel, Level};
use super::mask_bits::{MaskBits, SPAN};
use super::real::{Ordinal, Real};
use crate::dtype::DType;

/// Elements whose keys are computed together.
const STEP: usize = 64;

/// Elements after which narrow counters are emptied into wide ones.
const FLUSH: usize = 1 << 20;

/// How many keys lie inside an interval and above it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Keys greater than the interval's high end.
    pub above: u64,
    /// Keys in the interval, both ends included.
    pub inside: u64,
}

/// A closed interval of ordinals.
#[derive(Clone, Copy)]
struct Interval<O: Ordinal> {
    low: O,
    high: O,
}

impl<O: Ordinal> Interval<O> {
    fn new(low: u64, high: u64) -> Self {
        let high = high.min(O::MAX_KEY);
        assert!(low <= high, "the interval {low}..={high} of keys is empty");
        Self { low: O::from_key(low), high: O::from_key(high) }
    }

    #[inline(always)]
    fn contains(self, ordinal: O) -> bool {
        self.low <= ordinal && ordinal <= self.high
    }

    fn span(self) -> O::Distance {
        self.high.above(self.low)
    }
}

struct Count<'a, T: Real> {
    values: &'a [T],
    interval: Interval<T::Ordinal>,
}

impl<T: Real> Kernel for Count<'_, T> {
    type Output = Counts;

    #[inline(always)]
    fn run(self) -> Counts {
        type Counter<T> = <<T as Real>::Ordinal as Ordinal>::Counter;
        let Interval { low, high } = self.interval;
        let mut counts = Counts::default();
        for values in self.values.chunks(FLUSH) {
            let mut above = Counter::<T>::default();
            let mut reaching = Counter::<T>::default();
            for value in values {
                let ordinal = value.ordinal();
                above += Counter::<T>::from(ordinal > high);
                reaching += Counter::<T>::from(ordinal >= low);
            }
            counts.above += above.into();
            counts.inside += reaching.into() - above.into();
        }
        counts
    }
}

struct Histogram<'a, T: Real> {
    values: &'a [T],
    interval: Interval<T::Ordinal>,
    shift: u32,
    bins: &'a mut [u32],
}

impl<T: Real> Histogram<'_, T> {
    /// The bin of an ordinal inside the interval.
    #[inline(always)]
    fn index(&self, ordinal: T::Ordinal) -> u32 {
        T::Ordinal::shifted(ordinal.above(self.interval.low), self.shift)
    }

    /// Adds [`STEP`] elements.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn step(&mut self, values: &[T; STEP], counts: &mut Counts) {
        let Interval { low, high } = self.interval;
        let zero = T::ZERO.ordinal();
        let harmless = (1_u32 << self.bins.len().min(STEP).ilog2()) - 1;
        let (mut above, mut inside, mut zeros) = (0_u32, 0_u32, 0_u32);
        let (mut weights, mut indices) = ([0_u32; STEP], [0_u32; STEP]);
        for position in 0..STEP {
            let ordinal = values[position].ordinal();
            let is_above = ordinal > high;
            let is_inside = (ordinal >= low) & !is_above;
            let is_counted = is_inside & (ordinal != zero);
            let (index, elsewhere) = (self.index(ordinal), position as u32 & harmless);
            above += u32::from(is_above);
            inside += u32::from(is_inside);
            zeros += u32::from(is_inside & (ordinal == zero));
            weights[position] = u32::from(is_counted);
            indices[position] = if is_counted { index } else { elsewhere };
        }
        counts.above += u64::from(above);
        counts.inside += u64::from(inside);
        if zeros > 0 {
            let index = self.index(zero);
            self.bins[index as usize] += zeros;
        }
        if inside > zeros {
            for (&index, &weight) in indices.iter().zip(&weights) {
                self.bins[index as usize] += weight;
            }
        }
    }

    /// Adds one element.
    #[inline(always)]
    fn one(&mut self, value: T, counts: &mut Counts) {
        let ordinal = value.ordinal();
        counts.above += u64::from(ordinal > self.interval.high);
        if self.interval.contains(ordinal) {
            counts.inside += 1;
            let index = self.index(ordinal);
            self.bins[index as usize] += 1;
        }
    }
}

impl<T: Real> Kernel for Histogram<'_, T> {
    type Output = Counts;

    #[inline(always)]
    fn run(mut self) -> Counts {
        let mut counts = Counts::default();
        let (steps, rest) = self.values.as_chunks();
        for values in steps {
            self.step(values, &mut counts);
        }
        for &value in rest {
            self.one(value, &mut counts);
        }
        counts
    }
}

/// How many keys lie above an interval and on its ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Keys greater than the high end.
    pub above: u64,
    /// Keys equal to the high end.
    pub high: u64,
    /// Keys equal to the low end, if that is another.
    pub low: u64,
}

/// Elements that are compared together: two AVX-512 registers of f32.
const GROUP: usize = 32;

/// Elements of a group that are looked at one by one if there is something among them to keep.
const PART: usize = 8;

/// Elements to look at, a group at a time.
trait Elements<T>: Copy {
    fn count(self) -> usize;
    fn one(self, at: usize) -> T;
    /// Those from `at` on.
    fn group(self, at: usize) -> [T; GROUP];
}

impl<T: Real> Elements<T> for &[T] {
    #[inline(always)]
    fn count(self) -> usize {
        self.len()
    }

    #[inline(always)]
    fn one(self, at: usize) -> T {
        self[at]
    }

    #[inline(always)]
    fn group(self, at: usize) -> [T; GROUP] {
        group(self, at)
    }
}

#[inline(always)]
fn group<T: Copy>(values: &[T], at: usize) -> [T; GROUP] {
    values[at..at + GROUP].try_into().expect("a slice of that length")
}

/// The magnitudes of a stored task vector, x − base, rounded to f32.
#[derive(Clone, Copy)]
struct Magnitudes<'a, F: Format> {
    x: &'a [F::Bytes],
    base: &'a [F::Bytes],
}

#[inline(always)]
pub(super) fn magnitude<F: Format>(x: F::Bytes, base: F::Bytes) -> f32 {
    (F::widen::<f32>(x) - F::widen::<f32>(base)).abs()
}

impl<F: Format> Elements<f32> for Magnitudes<'_, F> {
    #[inline(always)]
    fn count(self) -> usize {
        self.x.len()
    }

    #[inline(always)]
    fn one(self, at: usize) -> f32 {
        magnitude::<F>(self.x[at], self.base[at])
    }

    #[inline(always)]
    fn group(self, at: usize) -> [f32; GROUP] {
        let (x, base) = (group(self.x, at), group(self.base, at));
        std::array::from_fn(|at| magnitude::<F>(x[at], base[at]))
    }
}

/// `ONE_KEY` says that both ends are the same: there are fewer tests.
struct Collect<'a, T: Real, E, const ONE_KEY: bool> {
    elements: E,
    interval: Interval<T::Ordinal>,
    shift: u32,
    between: &'a mut Vec<u32>,
}

type Counter<T> = <<T as Real>::Ordinal as Ordinal>::Counter;

/// The counters of an interval, one for each place in a group.
struct Tallies<T: Real, const ONE_KEY: bool> {
    above: [Counter<T>; GROUP],
    reaching_high: [Counter<T>; GROUP],
    above_low: [Counter<T>; GROUP],
    reaching_low: [Counter<T>; GROUP],
}

impl<T: Real, const ONE_KEY: bool> Tallies<T, ONE_KEY> {
    #[inline(always)]
    fn new() -> Self {
        let none = || [Counter::<T>::default(); GROUP];
        Self { above: none(), reaching_high: none(), above_low: none(), reaching_low: none() }
    }

    /// Takes the element at one place of a group; whether it lies between the ends.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn add(&mut self, at: usize, Interval { low, high }: Interval<T::Ordinal>, value: T) -> bool {
        let ordinal = value.ordinal();
        self.above[at] += Counter::<T>::from(ordinal > high);
        self.reaching_high[at] += Counter::<T>::from(ordinal >= high);
        if ONE_KEY {
            return false;
        }
        self.above_low[at] += Counter::<T>::from(ordinal > low);
        self.reaching_low[at] += Counter::<T>::from(ordinal >= low);
        (ordinal > low) & (ordinal < high)
    }

    #[inline(always)]
    fn ends(self) -> Ends {
        let sum = |counters: [Counter<T>; GROUP]| counters.into_iter().map(Into::into).sum::<u64>();
        let (above, reaching_high) = (sum(self.above), sum(self.reaching_high));
        let low = sum(self.reaching_low) - sum(self.above_low);
        Ends { above, high: reaching_high - above, low }
    }
}

impl<T: Real, E: Elements<T>, const ONE_KEY: bool> Collect<'_, T, E, ONE_KEY> {
    /// Adds the offsets of those of `values` that lie between the ends. They are few, so that most
    /// parts of a group have none; or all, of a small tensor.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn keep(&mut self, values: &[T]) {
        let Interval { low, high } = self.interval;
        let is_between = |ordinal| (ordinal > low) & (ordinal < high);
        let offset = |ordinal: T::Ordinal| T::Ordinal::shifted(ordinal.above(low), self.shift);
        if let Ok(group) = <&[T; GROUP]>::try_from(values)
            && group.iter().fold(true, |all, value| all & is_between(value.ordinal()))
        {
            self.between.extend_from_slice(&group.map(|value| offset(value.ordinal())));
            return;
        }
        for part in values.chunks(PART) {
            if !part.iter().fold(false, |any, value| any | is_between(value.ordinal())) {
                continue;
            }
            let (mut found, mut count) = ([0; PART], 0);
            for value in part {
                let ordinal = value.ordinal();
                found[count % PART] = offset(ordinal);
                count += usize::from(is_between(ordinal));
            }
            self.between.extend_from_slice(&found[..count]);
        }
    }
}

impl<T: Real, E: Elements<T>, const ONE_KEY: bool> Kernel for Collect<'_, T, E, ONE_KEY> {
    type Output = Ends;

    #[inline(always)]
    fn run(mut self) -> Ends {
        let (elements, interval) = (self.elements, self.interval);
        let mut tallies = Tallies::<T, ONE_KEY>::new();
        let whole = elements.count() / GROUP * GROUP;
        for start in (0..whole).step_by(GROUP) {
            let values = elements.group(start);
            let mut any = false;
            for (at, &value) in values.iter().enumerate() {
                any |= tallies.add(at, interval, value);
            }
            if any {
                self.keep(&values);
            }
        }
        for at in whole..elements.count() {
            let value = elements.one(at);
            if tallies.add(at - whole, interval, value) {
                self.keep(&[value]);
            }
        }
        tallies.ends()
    }
}

/// Marks what a cut keeps of the magnitudes of up to a span of elements. Equal ones are kept before
/// element `equals_end`.
struct Mark<'a, F: Format> {
    elements: Magnitudes<'a, F>,
    least: i32,
    equals_end: usize,
    bits: &'a mut MaskBits,
}

impl<F: Format> Mark<'_, F> {
    #[inline(always)]
    fn each(&mut self, is_kept: impl Fn(usize, i32) -> bool) {
        let Magnitudes { x, base } = self.elements;
        let row = self.bits.len();
        for (bit, (x, base)) in x.chunks(row).zip(base.chunks(row)).enumerate() {
            for (at, (word, (&x, &base))) in
                self.bits.iter_mut().zip(x.iter().zip(base)).enumerate()
            {
                let kept = is_kept(bit * row + at, magnitude::<F>(x, base).ordinal());
                *word |= u32::from(kept) << bit;
            }
        }
    }
}

impl<F: Format> Kernel for Mark<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let (least, end) = (self.least, self.equals_end);
        if end == 0 {
            self.each(|_, ordinal| ordinal > least);
        } else if end >= self.elements.count() {
            self.each(|_, ordinal| ordinal >= least);
        } else {
            self.each(|at, ordinal| ordinal > least || (at < end && ordinal == least));
        }
    }
}

/// Where a cut lies: keys above `least` are kept, and those equal to it if `equals` says so.
#[derive(Clone, Copy)]
struct Cut<O> {
    least: O,
    equals: bool,
}

impl<O: Ordinal> Cut<O> {
    fn new(threshold: u64, equals: bool) -> Self {
        assert!(threshold <= O::MAX_KEY, "the threshold {threshold} is no key");
        Self { least: O::from_key(threshold), equals }
    }

    /// Calls `each` with every index and whether the ordinal there is kept. The test for equals is
    /// made once, outside the loop.
    #[inline(always)]
    fn each(self, count: usize, ordinal: impl Fn(usize) -> O, mut each: impl FnMut(usize, bool)) {
        if self.equals {
            (0..count).for_each(|index| each(index, ordinal(index) >= self.least));
        } else {
            (0..count).for_each(|index| each(index, ordinal(index) > self.least));
        }
    }
}

struct Keep<'a, T: Real> {
    values: &'a [T],
    cut: Cut<T::Ordinal>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Keep<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { values, cut, out } = self;
        let values = &values[..out.len()];
        let ordinal = |index: usize| values[index].ordinal();
        cut.each(values.len(), ordinal, |index, kept| out[index] = T::truth(kept));
    }
}

struct Trim<'a, T: Real> {
    values: &'a [T],
    cut: Cut<T::Ordinal>,
    out: &'a mut [T],
}

impl<T: Real> Kernel for Trim<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { values, cut, out } = self;
        let values = &values[..out.len()];
        let ordinal = |index: usize| values[index].abs().ordinal();
        cut.each(values.len(), ordinal, |index, kept| {
            out[index] = if kept { values[index] } else { T::ZERO };
        });
    }
}

struct Ordinals<'a, T: Real> {
    values: &'a [T],
    out: &'a mut [T::Ordinal],
}

impl<T: Real> Kernel for Ordinals<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, value) in self.out.iter_mut().zip(self.values) {
            *out = value.ordinal();
        }
    }
}

/// The order keys of `values`, as signed integers of their width.
///
/// # Panics
///
/// If `out` is not as long as `values`.
pub fn ordinals<T: Real>(level: Level, values: &[T], out: &mut [T::Ordinal]) {
    assert_eq!(values.len(), out.len(), "the values and the ordinals must have the same length");
    level.run(Ordinals { values, out });
}

/// Counts the keys inside `low..=high` and above it.
///
/// # Panics
///
/// If the interval is empty.
pub fn count<T: Real>(level: Level, values: &[T], low: u64, high: u64) -> Counts {
    level.run(Count { values, interval: Interval::new(low, high) })
}

/// Adds each key inside `low..=high` to `bins[(key − low) >> shift]`, and counts as [`count`] does.
///
/// # Panics
///
/// If the interval is empty, `shift` is not less than the key's width, or the interval has more
/// bins than `bins`. In debug builds, if a bin overflows.
pub fn histogram<T: Real>(
    level: Level,
    values: &[T],
    low: u64,
    high: u64,
    shift: u32,
    bins: &mut [u32],
) -> Counts {
    let interval = Interval::<T::Ordinal>::new(low, high);
    assert!(shift < 8 * size_of::<T>() as u32, "the shift {shift} exceeds the key's width");
    let span: u64 = interval.span().into();
    let last = span >> shift;
    assert!(last < bins.len() as u64, "bin {last} is missing: there are {}", bins.len());
    level.run(Histogram { values, interval, shift, bins })
}

/// Counts the keys above `low..=high` and on its ends, and adds what lies between them to `between`,
/// in order: `(key − low) >> shift` of each.
///
/// # Panics
///
/// If the interval is empty, `shift` is not less than the key's width, there are more than 2²⁰
/// values, or an offset does not fit.
pub fn collect<T: Real>(
    level: Level,
    values: &[T],
    low: u64,
    high: u64,
    shift: u32,
    between: &mut Vec<u32>,
) -> Ends {
    check_collect(values.len(), shift, 8 * size_of::<T>());
    collect_from::<T, _>(level, values, low, high, shift, between)
}

/// The same of the magnitudes of a stored task vector, x − base, rounded to f32.
///
/// # Panics
///
/// As [`collect`] does, or if the slices differ in length, or the type is not BF16, F16 or F32.
#[expect(clippy::too_many_arguments, reason = "as `collect`, of two slices of a type")]
pub fn collect_magnitudes(
    level: Level,
    dtype: DType,
    x: &[u8],
    base: &[u8],
    low: u64,
    high: u64,
    shift: u32,
    between: &mut Vec<u32>,
) -> Ends {
    let count = check_task_vector(dtype, x, base);
    check_collect(count, shift, 32);
    match dtype {
        DType::Bf16 => collect_from(level, magnitudes::<Bf16>(x, base), low, high, shift, between),
        DType::F16 => collect_from(level, magnitudes::<F16>(x, base), low, high, shift, between),
        _ => collect_from(level, magnitudes::<F32>(x, base), low, high, shift, between),
    }
}

fn magnitudes<'a, F: Format>(x: &'a [u8], base: &'a [u8]) -> Magnitudes<'a, F> {
    Magnitudes { x: F::elements(x), base: F::elements(base) }
}

pub(super) fn check_task_vector(dtype: DType, x: &[u8], base: &[u8]) -> usize {
    assert!(dtype != DType::F64, "{dtype} is not widened to f32");
    let count = x.len() / dtype.size();
    check_bytes("the input", dtype, x, count);
    check_bytes("the base", dtype, base, count);
    count
}

fn check_collect(count: usize, shift: u32, width: usize) {
    assert!(count <= FLUSH, "the counters are narrow");
    assert!(shift < width as u32, "the shift {shift} exceeds the key's width");
}

fn collect_from<T: Real, E: Elements<T>>(
    level: Level,
    elements: E,
    low: u64,
    high: u64,
    shift: u32,
    between: &mut Vec<u32>,
) -> Ends {
    let interval = Interval::<T::Ordinal>::new(low, high);
    let span: u64 = interval.span().into();
    assert!(u32::try_from(span >> shift).is_ok(), "the offsets of the interval must fit");
    if span == 0 {
        level.run(Collect::<T, E, true> { elements, interval, shift, between })
    } else {
        level.run(Collect::<T, E, false> { elements, interval, shift, between })
    }
}

/// Marks what a cut keeps of the magnitudes of a stored task vector, x − base, rounded to f32: keys
/// above the threshold, and before element `equals_end` those equal to it.
///
/// # Panics
///
/// If the slices differ in length or have more elements than a span, the type is not BF16, F16 or
/// F32, or the threshold is no key.
pub fn mark_largest(
    level: Level,
    dtype: DType,
    x: &[u8],
    base: &[u8],
    threshold: u64,
    equals_end: usize,
) -> MaskBits {
    fn go<F: Format>(
        level: Level,
        elements: Magnitudes<'_, F>,
        least: i32,
        equals_end: usize,
    ) -> MaskBits {
        let mut bits = [0; _];
        level.run(Mark { elements, least, equals_end, bits: &mut bits });
        bits
    }
    let count = check_task_vector(dtype, x, base);
    assert!(count <= SPAN, "a mask has the bits of a span");
    let least = Cut::<i32>::new(threshold, true).least;
    match dtype {
        DType::Bf16 => go(level, magnitudes::<Bf16>(x, base), least, equals_end),
        DType::F16 => go(level, magnitudes::<F16>(x, base), least, equals_end),
        _ => go(level, magnitudes::<F32>(x, base), least, equals_end),
    }
}

/// Marks what a cut keeps: `out[i]` is 1 if the key of `values[i]` is above the threshold, or equal
/// to it with `equals`; else 0.
///
/// # Panics
///
/// If `out` is not as long as `values`, or the threshold is no key.
pub fn keep<T: Real>(level: Level, values: &[T], threshold: u64, equals: bool, out: &mut [T]) {
    assert_eq!(values.len(), out.len(), "the values and the mask must have the same length");
    level.run(Keep { values, cut: Cut::new(threshold, equals), out });
}

/// Keeps what a cut of the magnitudes keeps: `out[i]` is `values[i]` if the key of its magnitude is
/// above the threshold, or equal to it with `equals`; else 0.
///
/// # Panics
///
/// If `out` is not as long as `values`, or the threshold is no key.
pub fn trim<T: Real>(level: Level, values: &[T], threshold: u64, equals: bool, out: &mut [T]) {
    assert_eq!(values.len(), out.len(), "the values and the output must have the same length");
    level.run(Trim { values, cut: Cut::new(threshold, equals), out });
}
