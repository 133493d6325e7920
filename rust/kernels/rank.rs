//! Ranks within vectors, and what is kept for them.
//!
//! Elements go from the largest down, by order key, equal ones by index. The *place* of an element is
//! how many come before it. Nothing needs to be sorted to know whether an element is kept:
//!
//! - The largest are those above a cut. The key of the last one is found by bisection: each step counts
//!   the keys that reach some number, many at once.
//! - At random, a draw is compared with a bound that moves with the place. Most draws are below all bounds
//!   or above. For the others, keys are counted in bins that go down from the largest; so each bin has
//!   some places in a row. Where all keys of a bin are equal, the place of an element is how many of its
//!   bin came before it. They are so in bins whose keys have no bits below those of the bin: differences
//!   of bf16 weights have few digits, and many are equal. In other bins the bounds of the first and the
//!   last place nearly always agree. The few elements that are still open are placed by counting.
//!
//! If too many are open (a row with one element of another size than all others), the vector is sorted.
//!
//! A vector that is too long to be held is gone through again and again ([`Descent`]): each time the
//! largest elements that are left are taken, so many as can be held.

use super::level::{Kernel, Level};
use super::real::Ordinal;

/// Elements up to which each is placed by counting.
const SHORT: usize = 32;
/// Open elements from which on a vector is sorted. To place one takes a look at all.
const MOST_OPEN: usize = 1024;
/// Bins have the magnitudes down to 2⁻¹⁶ of the largest, those of a power of two equally many; the last
/// one has all that are smaller.
const OCTAVE_BITS: u32 = 4;
/// The logarithms of the number of bins.
const LEAST_BINS: u32 = 6;
const MOST_BINS: u32 = 12;
/// Says in a slot that the key is not the least that its bin may have.
const MIXED: u16 = 1 << 15;

/// What is kept of a vector, by rank.
#[derive(Clone, Copy, Debug)]
pub enum Picked<'a> {
    /// So many of the largest.
    Largest(u64),
    /// At random, with a probability that goes from that of the smallest to that of the largest in
    /// even steps; the mean of both for a vector of one element. `draws` has one for each element.
    Random {
        /// The probability of the smallest.
        lowest: f64,
        /// The probability of the largest.
        highest: f64,
        /// Random words, in the order of the keys.
        draws: &'a [u32],
    },
}

/// Says what is kept of vectors. What it works with is kept from one to the next.
#[derive(Debug)]
pub struct Ranker<O> {
    level: Level,
    bounds: Bounds,
    bins: Bins,
    // One of several vectors that lie interleaved.
    vector: Vec<O>,
    draws: Vec<u32>,
    kept: Vec<u8>,
}

impl<O: Ordinal> Ranker<O> {
    /// With the kernels of a level.
    pub fn new(level: Level) -> Self {
        let (bounds, bins) = (Bounds::default(), Bins::default());
        Self { level, bounds, bins, vector: Vec::new(), draws: Vec::new(), kept: Vec::new() }
    }

    /// Writes 1 into `kept` for each element that is picked of its vector, else 0.
    ///
    /// `ordinals` are of `stride` vectors, which lie interleaved: the first elements of all, the second
    /// ones, and so on. The last elements of some may be missing.
    ///
    /// # Panics
    ///
    /// If `kept` or the draws are not as many as the ordinals, or these are 2³¹ or more.
    pub fn pick(&mut self, ordinals: &[O], stride: usize, picked: Picked<'_>, kept: &mut [u8]) {
        assert_eq!(ordinals.len(), kept.len(), "there must be as many marks as elements");
        assert!(ordinals.len() < 1 << 31, "places and a bit of a vector fit 32 bits");
        if let Picked::Random { draws, .. } = picked {
            assert_eq!(ordinals.len(), draws.len(), "there must be as many draws as elements");
        }
        if stride == 1 {
            return self.one(ordinals, picked, kept);
        }
        let (mut vector, mut own) =
            (std::mem::take(&mut self.vector), std::mem::take(&mut self.kept));
        let mut own_draws = std::mem::take(&mut self.draws);
        for first in 0..stride.min(ordinals.len()) {
            vector.clear();
            vector.extend(ordinals[first..].iter().step_by(stride));
            own.resize(vector.len(), 0);
            let picked = match picked {
                Picked::Largest(count) => Picked::Largest(count),
                Picked::Random { lowest, highest, draws } => {
                    own_draws.clear();
                    own_draws.extend(draws[first..].iter().step_by(stride));
                    Picked::Random { lowest, highest, draws: &own_draws }
                }
            };
            self.one(&vector, picked, &mut own);
            kept[first..].iter_mut().step_by(stride).zip(&own).for_each(|(to, from)| *to = *from);
        }
        (self.vector, self.kept, self.draws) = (vector, own, own_draws);
    }

    /// The same of one vector.
    fn one(&mut self, ordinals: &[O], picked: Picked<'_>, kept: &mut [u8]) {
        match picked {
            Picked::Largest(count) => self.level.run(Largest { ordinals, count, kept }),
            Picked::Random { lowest, highest, draws } => {
                let bounds = self.bounds.of(ordinals.len(), lowest, highest);
                let bins = &mut self.bins;
                if !self.level.run(Random { ordinals, draws, bounds, kept, bins }) {
                    let mut order: Vec<usize> = (0..ordinals.len()).collect();
                    order.sort_unstable_by_key(|&at| (std::cmp::Reverse(ordinals[at]), at));
                    for (&at, &bound) in order.iter().zip(bounds) {
                        kept[at] = u8::from(u64::from(draws[at]) < bound);
                    }
                }
            }
        }
    }
}

/// What the draw of the element at each place must be below.
#[derive(Debug, Default)]
struct Bounds {
    lowest: f64,
    highest: f64,
    by_place: Vec<u64>,
}

impl Bounds {
    /// Those of a vector of `length`.
    fn of(&mut self, length: usize, lowest: f64, highest: f64) -> &[u64] {
        if (self.by_place.len(), self.lowest, self.highest) != (length, lowest, highest) {
            let last = (length as u64).saturating_sub(1);
            let ranks = (0..length as u64).rev();
            self.by_place.clear();
            self.by_place.extend(ranks.map(|rank| bound(rank, last, lowest, highest)));
            (self.lowest, self.highest) = (lowest, highest);
        }
        &self.by_place
    }
}

/// How many elements come before that at `at`.
#[inline(always)]
fn place<O: Ordinal>(ordinals: &[O], at: usize) -> usize {
    let (before, behind) = ordinals.split_at(at);
    let own = behind[0];
    let reaching = count(before, |ordinal| ordinal >= own);
    (reaching + count(behind, |ordinal| ordinal > own)) as usize
}

#[inline(always)]
fn count<O: Ordinal>(ordinals: &[O], is_counted: impl Fn(O) -> bool) -> u64 {
    let mut found = O::Counter::default();
    for &ordinal in ordinals {
        found += O::Counter::from(is_counted(ordinal));
    }
    found.into()
}

struct Largest<'a, O> {
    ordinals: &'a [O],
    count: u64,
    kept: &'a mut [u8],
}

impl<O: Ordinal> Kernel for Largest<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { ordinals, count: wanted, kept } = self;
        if wanted == 0 || wanted >= ordinals.len() as u64 {
            kept.fill(u8::from(wanted > 0));
            return;
        }
        if ordinals.len() <= SHORT {
            for (at, kept) in kept.iter_mut().enumerate() {
                *kept = u8::from((place(ordinals, at) as u64) < wanted);
            }
            return;
        }
        // The greatest key that so many reach lies between these.
        let (least, greatest) = ends(ordinals);
        let (mut low, mut high) = (least.to_key(), greatest.to_key());
        while low < high {
            let middle = high - (high - low) / 2;
            let ordinal = O::from_key(middle);
            if count(ordinals, |other| other >= ordinal) >= wanted {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        let cut = O::from_key(low);
        let equals = wanted - count(ordinals, |other| other > cut);
        let mut places = (0..ordinals.len()).filter(|&at| ordinals[at] == cut);
        let last = places.nth(equals as usize - 1).expect("the cut is the key of an element");
        for (at, (kept, &ordinal)) in kept.iter_mut().zip(ordinals).enumerate() {
            *kept = u8::from(if at <= last { ordinal >= cut } else { ordinal > cut });
        }
    }
}

/// The least and the greatest of some.
#[inline(always)]
fn ends<O: Ordinal>(ordinals: &[O]) -> (O, O) {
    let (mut least, mut greatest) = (ordinals[0], ordinals[0]);
    for &ordinal in ordinals {
        least = least.min(ordinal);
        greatest = greatest.max(ordinal);
    }
    (least, greatest)
}

/// False if the vector must be sorted.
struct Random<'a, O> {
    ordinals: &'a [O],
    draws: &'a [u32],
    bounds: &'a [u64],
    kept: &'a mut [u8],
    bins: &'a mut Bins,
}

impl<O: Ordinal> Kernel for Random<'_, O> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { ordinals, draws, bounds, kept, bins } = self;
        let is_below = |at: usize, place: usize| u64::from(draws[at]) < bounds[place];
        if ordinals.len() <= SHORT {
            for (at, kept) in kept.iter_mut().enumerate() {
                *kept = u8::from(is_below(at, place(ordinals, at)));
            }
            return true;
        }
        let ends = [bounds[0], bounds[bounds.len() - 1]];
        let open = mark_certain(draws, ends, kept, &mut bins.open);
        bins.fill(ordinals);
        let mut undecided = 0;
        for index in 0..open {
            let at = bins.open[index] as usize;
            let [first, last] = bins.places(at);
            let is_kept = is_below(at, first);
            kept[at] = u8::from(is_kept);
            bins.open[undecided] = at as u32;
            undecided += usize::from(is_kept != is_below(at, last));
        }
        if undecided > MOST_OPEN {
            return false;
        }
        for &at in &bins.open[..undecided] {
            kept[at as usize] = u8::from(is_below(at as usize, place(ordinals, at as usize)));
        }
        true
    }
}

/// Keeps the elements whose draws are below both ends of the bounds, and lists those whose draws may lie
/// between; says how many these are.
#[inline(always)]
#[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
fn mark_certain(draws: &[u32], ends: [u64; 2], kept: &mut [u8], open: &mut Vec<u32>) -> usize {
    let highest = u64::from(u32::MAX);
    // All draws below the first are kept, and none above the second is. A bound may be 2³².
    let from = ends[0].min(ends[1]).min(highest) as u32;
    let to = ends[0].max(ends[1]).saturating_sub(1).min(highest) as u32;
    for (kept, &draw) in kept.iter_mut().zip(draws) {
        *kept = u8::from(draw < from);
    }
    open.resize(draws.len(), 0);
    let mut count = 0;
    for (at, &draw) in draws.iter().enumerate() {
        open[count] = at as u32;
        count += usize::from((draw >= from) & (draw <= to));
    }
    count
}

/// The elements of a vector in bins, from the largest down.
#[derive(Debug, Default)]
struct Bins {
    /// Of each element, the bin, and whether its key is [`MIXED`].
    slots: Vec<u16>,
    /// How many of its bin come before each element, by index.
    earlier: Vec<u32>,
    /// Of each bin, twice how many elements it has, and 1 if one of them is mixed. Zeros between uses.
    counts: Vec<u32>,
    /// The first place of each bin, and of mixed ones how many come after it, else 0.
    starts: Vec<[u32; 2]>,
    /// Indices of elements that are to be looked at.
    open: Vec<u32>,
}

impl Bins {
    /// Puts the elements in bins. The least ones have one of their own, the last: many may be zero.
    #[inline(always)]
    fn fill<O: Ordinal>(&mut self, ordinals: &[O]) {
        let bits = (ordinals.len().ilog2() - 1).clamp(LEAST_BINS, MOST_BINS);
        let (shift, last) = (O::MANTISSA + OCTAVE_BITS - bits, 1 << bits);
        let (least, greatest) = ends(ordinals);
        let top = greatest.high(shift);
        self.slots.resize(ordinals.len(), 0);
        for (slot, &ordinal) in self.slots.iter_mut().zip(ordinals) {
            let high = ordinal.high(shift);
            let bin = O::shifted(top.above(high), 0).min(last - 1) as u16;
            let mixed = if ordinal.has_below(shift) { MIXED } else { 0 };
            // What is too small for the other bins shares one.
            let shared = if u32::from(bin) == last - 1 { MIXED } else { 0 };
            *slot = if ordinal == least { last as u16 } else { bin | mixed | shared };
        }
        self.counts.resize((1 << MOST_BINS) + 1, 0);
        self.earlier.resize(ordinals.len(), 0);
        for (earlier, &slot) in self.earlier.iter_mut().zip(&self.slots) {
            let count = &mut self.counts[usize::from(slot & !MIXED)];
            *earlier = *count / 2;
            *count = (*count + 2) | u32::from(slot / MIXED);
        }
        self.starts.resize(self.counts.len(), [0; 2]);
        let mut start = 0;
        for (count, place) in self.counts[..=last as usize].iter_mut().zip(&mut self.starts) {
            let (elements, mixed) = (*count / 2, *count % 2);
            *place = [start, mixed * elements.saturating_sub(1)];
            *count = 0;
            start += elements;
        }
    }

    /// Between which places that of an element lies, both included.
    #[inline(always)]
    fn places(&self, at: usize) -> [usize; 2] {
        let [start, more] = self.starts[usize::from(self.slots[at] & !MIXED)];
        let first = start + if more == 0 { self.earlier[at] } else { 0 };
        [first as usize, (first + more) as usize]
    }
}

/// The elements of one vector from the largest down, so many at a time.
#[derive(Debug)]
pub struct Descent {
    most: usize,
    /// Those that were given before come up to this one in the order, which is by key and index.
    done: Option<u128>,
    /// No later one is among the largest that are left.
    last: u128,
    held: Vec<u128>,
    place: u64,
}

impl Descent {
    /// Gives `most` elements at a time.
    ///
    /// # Panics
    ///
    /// If that is none.
    pub fn new(most: usize) -> Self {
        assert!(most > 0, "a descent goes down by some elements at a time");
        let held = Vec::with_capacity(2 * most);
        Self { most, done: None, last: u128::MAX, held, place: 0 }
    }

    /// Takes what it needs of the elements from `first` on, which have these order keys.
    pub fn take(&mut self, first: u64, keys: &[u64]) {
        for (index, &key) in (first..).zip(keys) {
            let each = u128::from(!key) << 64 | u128::from(index);
            if each > self.last || self.done.is_some_and(|done| each <= done) {
                continue;
            }
            if self.held.len() == 2 * self.most {
                self.last = *self.held.select_nth_unstable(self.most - 1).1;
                self.held.truncate(self.most);
                if each > self.last {
                    continue;
                }
            }
            self.held.push(each);
        }
    }

    /// The next elements, when all of the vector were taken: index and place of each, in the order of
    /// their indices. None if there are no more.
    pub fn next_down(&mut self) -> Vec<(u64, u64)> {
        self.held.sort_unstable();
        self.held.truncate(self.most);
        self.done = self.held.last().copied().or(self.done);
        let mut next: Vec<(u64, u64)> =
            self.held.iter().zip(self.place..).map(|(&each, place)| (each as u64, place)).collect();
        next.sort_unstable();
        self.place += next.len() as u64;
        self.last = u128::MAX;
        self.held.clear();
        next
    }
}

/// What a draw must be below for the element of a rank, counted from the smallest, to be kept.
pub fn bound(rank: u64, last: u64, lowest: f64, highest: f64) -> u64 {
    let share = if last == 0 { 0.5 } else { rank as f64 / last as f64 };
    // Truncation is the floor: it is not negative.
    ((lowest + (highest - lowest) * share) * 4_294_967_296.0 + 0.5) as u64
}
