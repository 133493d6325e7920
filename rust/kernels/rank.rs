//! Ranks within vectors, and what is kept for them.
//!
//! Elements go from the largest down, by order key, equal ones by index. The *place* of an element is
//! how many come before it. Nothing needs to be sorted to know whether an element is kept:
//!
//! - The largest are those above a cut. The key of the last one is found by bisection: each step counts
//!   the keys that reach some number, many at once, and finds the keys next to it. So it ends after as
//!   many steps as halve the different keys, which are few among differences of bf16 weights.
//! - At random, a draw is compared with a bound that moves with the place. Most draws are below all bounds
//!   or above. For the others, keys are counted in bins that go down from the largest; so each bin has
//!   some places in a row, and nearly always the bounds of the first and the last place agree. Keys
//!   without bits below those of their bin have another bin, behind that of those with such bits. They
//!   are equal, so their places are known: how many of the bin came before. Differences of bf16 weights
//!   have few digits, and most are so. The few elements that are still open are placed by counting.
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
/// The logarithm of the number of bins is by so much less than that of the number of elements, and lies
/// between these.
const LESS_BINS: u32 = 3;
const LEAST_BINS: u32 = 6;
const MOST_BINS: u32 = 12;
/// Numbers of bins there may be, those of equal keys included: odd numbers.
const TABLE: usize = 2 << MOST_BINS;
/// Bins that are looked at together.
const GROUP: usize = 64;
/// Elements among which equal ones at a cut are counted together.
const PART: usize = 64;

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
    /// Made when draws are first bounded by ranks.
    bins: Option<Bins>,
    // One of several vectors that lie interleaved.
    vector: Vec<O>,
    draws: Vec<u32>,
    kept: Vec<u8>,
}

impl<O: Ordinal> Ranker<O> {
    /// With the kernels of a level.
    pub fn new(level: Level) -> Self {
        let (bounds, bins) = (Bounds::default(), None);
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
                self.bounds.set(ordinals.len(), lowest, highest);
                let (bounds, bins) = (&self.bounds, self.bins.get_or_insert_default());
                if !self.level.run(Random { ordinals, draws, bounds, kept, bins }) {
                    let mut order: Vec<usize> = (0..ordinals.len()).collect();
                    order.sort_unstable_by_key(|&at| (std::cmp::Reverse(ordinals[at]), at));
                    for (&at, &bound) in order.iter().zip(&bounds.by_place) {
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
    /// Makes them those of a vector of `length`.
    fn set(&mut self, length: usize, lowest: f64, highest: f64) {
        if (self.by_place.len(), self.lowest, self.highest) != (length, lowest, highest) {
            let last = (length as u64).saturating_sub(1);
            let ranks = (0..length as u64).rev();
            self.by_place.clear();
            self.by_place.extend(ranks.map(|rank| bound(rank, last, lowest, highest)));
            (self.lowest, self.highest) = (lowest, highest);
        }
    }

    /// About where they lie.
    fn line(&self) -> Line {
        let step = (self.highest - self.lowest) / (self.by_place.len() - 1) as f64;
        Line { first: self.highest * DRAWS, step: step * DRAWS }
    }
}

/// The bounds as numbers on a line, which are less than [`MARGIN`] off.
#[derive(Clone, Copy, Debug)]
struct Line {
    first: f64,
    step: f64,
}

/// How many draws there are: 2³².
const DRAWS: f64 = 4_294_967_296.0;
/// Bounds are rounded, and so is each step to a number on the line.
const MARGIN: f64 = 2.0;
/// 2⁵². The lowest bits of a sum with a whole number are that number.
const WHOLE: f64 = 4_503_599_627_370_496.0;

impl Line {
    /// A draw below the first number is below the bounds of both places; one above the second is not below
    /// either.
    #[inline(always)]
    fn limits(self, places: [u32; 2]) -> [u32; 2] {
        let [a, b] = places.map(|place| self.first - self.step * f64::from(place));
        let (least, most) = if a < b { (a, b) } else { (b, a) };
        // Without a conversion to an integer, which is not vectorised.
        [least - MARGIN, most + MARGIN]
            .map(|limit| (limit.clamp(0.0, DRAWS - 1.0) + WHOLE).to_bits() as u32)
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
        // The cut is the greatest key that so many reach. It is an element's, and lies between these.
        let (mut low, mut high) = ends(ordinals);
        while low < high {
            let (from, to) = (low.to_key(), high.to_key());
            let sides = Sides::of(ordinals, O::from_key(to - (to - from) / 2));
            if sides.reaching >= wanted {
                low = sides.least_reaching;
            } else {
                high = sides.greatest_below;
            }
            if sides.reaching == wanted {
                high = low;
            }
        }
        let cut = low;
        let mut equals = (wanted - count(ordinals, |other| other > cut)) as usize;
        // Equal ones are kept up to the last that there is room for.
        for (kept, ordinals) in kept.chunks_mut(PART).zip(ordinals.chunks(PART)) {
            let equal = count(ordinals, |other| other == cut) as usize;
            if equal <= equals {
                mark(kept, ordinals, |ordinal| ordinal >= cut);
                equals -= equal;
                continue;
            }
            mark(kept, ordinals, |ordinal| ordinal > cut);
            let places = (0..ordinals.len()).filter(|&at| ordinals[at] == cut);
            places.take(equals).for_each(|at| kept[at] = 1);
            equals = 0;
        }
    }
}

#[inline(always)]
fn mark<O: Ordinal>(kept: &mut [u8], ordinals: &[O], is_kept: impl Fn(O) -> bool) {
    for (kept, &ordinal) in kept.iter_mut().zip(ordinals) {
        *kept = u8::from(is_kept(ordinal));
    }
}

/// What lies on both sides of a key.
struct Sides<O> {
    /// How many reach it.
    reaching: u64,
    least_reaching: O,
    greatest_below: O,
}

impl<O: Ordinal> Sides<O> {
    #[inline(always)]
    fn of(ordinals: &[O], key: O) -> Self {
        let mut reaching = O::Counter::default();
        let (lowest, highest) = (O::from_key(0), O::from_key(O::MAX_KEY));
        let (mut least_reaching, mut greatest_below) = (highest, lowest);
        for &ordinal in ordinals {
            // Each side by a test of its own, which is vectorised.
            let (reaches, is_below) = (ordinal >= key, ordinal < key);
            reaching += O::Counter::from(reaches);
            least_reaching = least_reaching.min(if reaches { ordinal } else { highest });
            greatest_below = greatest_below.max(if is_below { ordinal } else { lowest });
        }
        Self { reaching: reaching.into(), least_reaching, greatest_below }
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
    bounds: &'a Bounds,
    kept: &'a mut [u8],
    bins: &'a mut Bins,
}

impl<O: Ordinal> Kernel for Random<'_, O> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { ordinals, draws, bounds, kept, bins } = self;
        let is_below = |at: usize, place: usize| u64::from(draws[at]) < bounds.by_place[place];
        if ordinals.len() <= SHORT {
            for (at, kept) in kept.iter_mut().enumerate() {
                *kept = u8::from(is_below(at, place(ordinals, at)));
            }
            return true;
        }
        let line = bounds.line();
        let ends = line.limits([0, ordinals.len() as u32 - 1]);
        let open = mark_certain(draws, ends, kept, &mut bins.open);
        bins.fill(ordinals, line);
        let open = bins.mark(draws, open, kept);
        let mut undecided = 0;
        for index in 0..open {
            let at = bins.open[index] as usize;
            if let Some(place) = bins.place(at) {
                kept[at] = u8::from(is_below(at, place));
            } else {
                bins.open[undecided] = at as u32;
                undecided += 1;
            }
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

/// Marks the elements whose draws are below the limits, and lists those whose draws lie between; says how
/// many these are.
#[inline(always)]
fn mark_certain(draws: &[u32], limits: [u32; 2], kept: &mut [u8], open: &mut Vec<u32>) -> usize {
    let [from, to] = limits;
    for (kept, &draw) in kept.iter_mut().zip(draws) {
        *kept = u8::from(draw < from);
    }
    open.resize(draws.len(), 0);
    let open = &mut open[..draws.len()];
    let mut count = 0;
    let mut list = |at: usize, draw: u32| {
        open[count] = at as u32;
        count += usize::from(draw.wrapping_sub(from) <= to - from);
    };
    let (parts, rest) = draws.as_chunks::<UNROLLED>();
    for (part, draws) in parts.iter().enumerate() {
        draws.iter().enumerate().for_each(|(at, &draw)| list(part * UNROLLED + at, draw));
    }
    let first = draws.len() - rest.len();
    rest.iter().enumerate().for_each(|(at, &draw)| list(first + at, draw));
    count
}

/// Elements of a step of a loop that is not vectorised.
const UNROLLED: usize = 8;

/// A number a bin.
type Table = Box<[u32; TABLE]>;

/// The elements of a vector in bins, from the largest down.
#[derive(Debug)]
struct Bins {
    /// Of each element, the bin.
    slots: Vec<u16>,
    /// How many of its bin and its half of the vector come before each element, by index.
    earlier: Vec<u32>,
    /// How many of each half are in each bin.
    counts: [Table; 2],
    /// The first place of each bin.
    starts: Table,
    /// Draws below the first keep any element of a bin; those above the second keep none.
    limits: [Table; 2],
    /// Indices of elements that are to be looked at.
    open: Vec<u32>,
}

impl Default for Bins {
    fn default() -> Self {
        let (slots, earlier, open) = (Vec::new(), Vec::new(), Vec::new());
        let table = || vec![0; TABLE].try_into().expect("a table of that length");
        let (counts, limits) = ([table(), table()], [table(), table()]);
        Self { slots, earlier, counts, starts: table(), limits, open }
    }
}

impl Bins {
    /// Puts the elements in bins. The least ones have one of their own, the last: many may be zero.
    #[inline(always)]
    #[expect(clippy::needless_bitwise_bool, reason = "a short circuit would become a branch")]
    fn fill<O: Ordinal>(&mut self, ordinals: &[O], line: Line) {
        let log = (ordinals.len().ilog2() - LESS_BINS).clamp(LEAST_BINS, MOST_BINS);
        let (shift, steps) = (O::MANTISSA + OCTAVE_BITS - log, (1 << log) - 1);
        let (least, greatest) = ends(ordinals);
        let top = greatest.high(shift);
        self.slots.resize(ordinals.len(), 0);
        for (slot, &ordinal) in self.slots.iter_mut().zip(ordinals) {
            let step = O::shifted(top.above(ordinal.high(shift)), 0);
            // What is too small for the other bins shares one.
            let is_equal = !ordinal.has_below(shift) & (step < steps - 1);
            let bin = step.min(steps - 1) << 1 | u32::from(is_equal);
            *slot = if ordinal == least { (steps << 1 | 1) as u16 } else { bin as u16 };
        }
        self.earlier.resize(ordinals.len(), 0);
        // Both halves at a time: equal elements in a row wait for each other.
        let half = ordinals.len().div_ceil(2);
        let groups = (2 * steps as usize + 2).div_ceil(GROUP);
        for counts in &mut self.counts {
            counts[..groups * GROUP].fill(0);
        }
        let [first, second] = self.counts.each_mut().map(|counts| &mut **counts);
        let add = |counts: &mut [u32; TABLE], slot: u16, earlier: &mut u32| {
            let count = &mut counts[usize::from(slot) % TABLE];
            *earlier = *count;
            *count += 1;
        };
        let (earlier, later) = self.earlier.split_at_mut(half);
        let (slots, later_slots) = self.slots.split_at(half);
        for ((earlier, &slot), (later, &later_slot)) in
            earlier.iter_mut().zip(slots).zip(later.iter_mut().zip(later_slots))
        {
            add(first, slot, earlier);
            add(second, later_slot, later);
        }
        for at in later.len()..half {
            add(first, slots[at], &mut earlier[at]);
        }
        let mut start = 0;
        for group in 0..groups {
            start = self.fill_group(group, start, line);
        }
    }

    /// Finds places and limits of the bins of a group, from the first place of it, and says which is the
    /// first one behind it.
    #[inline(always)]
    fn fill_group(&mut self, group: usize, start: u32, line: Line) -> u32 {
        let own = group * GROUP..(group + 1) * GROUP;
        // Arrays of its own, which are known not to overlap.
        let (mut counted, mut starts, mut limits) = ([0; GROUP], [0; GROUP], [[0; GROUP]; 2]);
        let [first, second] = self.counts.each_ref().map(|counts| &counts[own.clone()]);
        for at in 0..GROUP {
            counted[at] = first[at] + second[at];
        }
        let mut next = start;
        for at in 0..GROUP {
            starts[at] = next;
            next += counted[at];
        }
        for at in 0..GROUP {
            let last = starts[at] + counted[at].saturating_sub(1);
            [limits[0][at], limits[1][at]] = line.limits([starts[at], last]);
        }
        self.starts[own.clone()].copy_from_slice(&starts);
        for (to, limits) in self.limits.iter_mut().zip(limits) {
            to[own.clone()].copy_from_slice(&limits);
        }
        next
    }

    /// Decides the first `open` elements that are to be looked at by the limits of their bins, and says how
    /// many are left.
    #[inline(always)]
    fn mark(&mut self, draws: &[u32], open: usize, kept: &mut [u8]) -> usize {
        let ([from, to], slots) = (&self.limits, &self.slots[..draws.len()]);
        let (list, kept) = (&mut self.open[..open], &mut kept[..draws.len()]);
        let mut left = 0;
        for index in 0..list.len() {
            let at = list[index] as usize;
            let bin = usize::from(slots[at]) % TABLE;
            let (draw, from, to) = (draws[at], from[bin], to[bin]);
            kept[at] = u8::from(draw < from);
            list[left] = at as u32;
            left += usize::from(draw.wrapping_sub(from) <= to - from);
        }
        left
    }

    /// The place of an element, if all of its bin have the same key.
    #[inline(always)]
    fn place(&self, at: usize) -> Option<usize> {
        let bin = usize::from(self.slots[at]) % TABLE;
        let is_second = at >= self.slots.len().div_ceil(2);
        let before = if is_second { self.counts[0][bin] } else { 0 };
        (bin % 2 == 1).then(|| (self.starts[bin] + before + self.earlier[at]) as usize)
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
