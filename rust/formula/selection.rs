//! Exact order statistics in little memory, without sorting.
//!
//! The k-th largest of a billion values is found by narrowing an interval of order keys (unsigned
//! integers that order as the values do) until it holds a single key:
//!
//! 1. Start with an interval: all keys, or one around the rank, guessed from a sample that is as
//!    large as pays. How much the sampled runs of elements differ among themselves says how far the
//!    guess may be off.
//! 2. In one pass over the tensor, count the keys above the interval and on its two ends, and keep
//!    those between. With bf16 weights realistic differences have few distinct values; a value with
//!    more copies than the interval is wide lies on an end of it. So what is kept is about as many
//!    as the guess may be off: some hundredths of the tensor, and one pass does it.
//! 3. Where the memory has no room for so many, or there are more than expected, keys are put into
//!    at most 2^14 bins of equal width instead, and the bin that holds rank k becomes the interval
//!    of another pass. If rank k lies outside (a bad guess), go on with the keys on that side.
//! 4. A single key is the threshold. If all its elements are kept, done. Else find the flat index
//!    of the last one kept, from the counts of equal elements in each block.
//!
//! The result does not depend on the guess, nor on the memory: only the number of passes does.

use super::Chosen;
use crate::kernels::{BLOCK, Ends, Real};

/// Bins a histogram has at the most: each worker's stays in the cache.
const BINS_LOG2: u32 = 14;
/// Bytes of the histograms of one selection: of a worker, and of the search.
pub(crate) const HISTOGRAM_BYTES: u64 = size_of::<u32>() as u64 * (1 << BINS_LOG2);
pub(crate) const SEARCH_BYTES: u64 = size_of::<u64>() as u64 * (1 << BINS_LOG2);
/// Bytes of a search for each block of the tensor.
pub(crate) const SEARCH_BYTES_A_BLOCK: u64 = size_of::<InBlock>() as u64;
/// Elements that lie side by side in a sample: few, since rows of weights are often not alike.
pub(crate) const RUN: usize = 256;
/// Runs that are sampled at the most.
const MOST_RUNS: u64 = 512;
/// How many standard deviations a guess allows for; where there is no room for the keys, fewer.
const DEVIATIONS: [f64; 4] = [5.0, 3.5, 2.5, 1.5];
/// How many times as many keys may be kept as there would be if no element were like the next.
const LEEWAY: u64 = 3;
const KEY_BYTES: u64 = size_of::<u32>() as u64;

/// How many runs of a tensor of `elements` are sampled to guess where a threshold lies; none of a
/// small one, all of whose keys are kept.
///
/// Twice the sample makes the interval narrower by √2. The sum of what it costs to sample and to
/// keep is least for the elements to the power of ⅔; the factor is measured.
pub(crate) fn sampled_runs(elements: u64) -> u64 {
    if elements <= BLOCK as u64 {
        return 0;
    }
    let best = (2.0 * elements as f64).powf(2.0 / 3.0);
    ((best / RUN as f64) as u64).clamp(16, MOST_RUNS)
}

/// Bytes of the keys of a sample.
pub(crate) fn sample_bytes(elements: u64) -> u64 {
    sampled_runs(elements) * (RUN * size_of::<u64>()) as u64
}

/// Bytes that the kept keys of a search may take.
pub(crate) fn kept_bytes(elements: u64) -> u64 {
    let sampled = sampled_runs(elements) * RUN as u64;
    let most = match sampled {
        0 => elements,
        _ => LEEWAY * (DEVIATIONS[0] * elements as f64 / (sampled as f64).sqrt()) as u64,
    };
    KEY_BYTES * most.min(elements)
}

/// How many elements of a tensor lie between the cuts of a bracket, as far as can be said before there
/// is a sample: where as many are kept as not.
pub(crate) fn expected_undecided(elements: u64) -> u64 {
    let sampled = (sampled_runs(elements) * RUN as u64).max(1) as f64;
    (DEVIATIONS[0] * elements as f64 / sampled.sqrt()) as u64
}

/// Keys that a unit of `elements` may keep.
fn most_in_a_unit(elements: u64) -> u64 {
    (elements / 8).max(BLOCK as u64).min(elements)
}

/// The same for a moment: a block is looked at whole before keys that are too many go.
fn most_at_once(elements: u64) -> u64 {
    (most_in_a_unit(elements) + BLOCK as u64).min(elements)
}

/// Bytes of the keys of a search that a unit of `elements` may have.
pub(crate) fn unit_bytes(elements: u64) -> u64 {
    KEY_BYTES * most_at_once(elements)
}

/// A closed interval of order keys, and what to find out about the elements in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval {
    pub(crate) low: u64,
    pub(crate) high: u64,
    /// Bits of the distance to the low end that are not told apart.
    pub(crate) shift: u32,
    pub(crate) look: Look,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// How many lie in each of so many bins.
    Bins(usize),
    /// How many lie on the ends, in each block, and which keys lie between.
    Keys,
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// 1 is the largest value.
    rank: u64,
    elements: u64,
    largest_key: u64,
    /// How many keys may be kept.
    room: u64,
}

/// Where it may be found: about `between` elements lie between these keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guess {
    low: u64,
    high: u64,
    between: u64,
    pub(crate) bracket: Bracket,
}

/// Between which cuts the one that is looked for lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bracket {
    /// What this keeps is kept.
    pub(crate) least: Chosen,
    /// What this does not keep is not kept.
    pub(crate) most: Chosen,
}

impl Bracket {
    /// Around a cut that is known.
    pub(crate) fn of(chosen: Chosen) -> Self {
        Self { least: chosen, most: chosen }
    }

    /// Whether `chosen` lies in it. It may not: a bracket is a guess.
    pub(crate) fn contains(&self, chosen: Chosen) -> bool {
        let place = |cut: Chosen| (std::cmp::Reverse(cut.threshold), cut.equals_end);
        place(self.least) <= place(chosen) && place(chosen) <= place(self.most)
    }
}

/// An interval that is being narrowed to the key of a rank.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    wanted: Wanted,
    interval: Interval,
    above: u64,
    bins: Vec<u64>,
    kept: Vec<Kept>,
    has_all_keys: bool,
}

/// Where the last kept equal element lies: the `nth` equal element (from 1) of block `block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastKept {
    pub(crate) block: u64,
    pub(crate) nth: u64,
}

/// What was found in some blocks.
#[derive(Clone, Debug, Default)]
struct Kept {
    blocks: Vec<InBlock>,
    /// The keys between the ends, block by block, as offsets from the low end.
    keys: Vec<u32>,
}

/// How many elements of a block lie on the ends of the interval and between them.
#[derive(Clone, Copy, Debug)]
struct InBlock {
    block: u64,
    high: u32,
    low: u32,
    between: u32,
}

/// What a worker counted over some blocks.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) above: u64,
    pub(crate) bins: Vec<u32>,
    kept: Kept,
    has_all_keys: bool,
    /// How many keys may be kept.
    most: usize,
}

/// What a finished pass says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Another pass over the tensor is needed.
    Again,
    /// One block has to be looked at again, to find a flat index.
    Locate(LastKept),
    /// Found.
    Done(Chosen),
}

impl Search {
    /// Looks for the `count` largest of `elements` values, and may keep `room` bytes of keys.
    pub(crate) fn new<T: Real>(count: u64, elements: u64, room: u64) -> Self {
        debug_assert!((1..=elements).contains(&count), "rank {count} of {elements}");
        let largest_key = T::NAN.key();
        let mut search = Self {
            wanted: Wanted { rank: count, elements, largest_key, room: room / KEY_BYTES },
            interval: Interval { low: 0, high: largest_key, shift: 0, look: Look::Keys },
            above: 0,
            bins: Vec::new(),
            kept: Vec::new(),
            has_all_keys: true,
        };
        search.look_in(0, largest_key, elements);
        search
    }

    /// What to find out in the next pass.
    pub(crate) fn interval(&self) -> Interval {
        self.interval
    }

    /// What is looked for.
    pub(crate) fn wanted(&self) -> Wanted {
        self.wanted
    }

    /// Begins where a sample says.
    pub(crate) fn begin_at(&mut self, Guess { low, high, between, .. }: Guess) {
        self.look_in(low, high, between);
    }

    /// Makes `low..=high` the interval; about `between` elements lie between its ends.
    fn look_in(&mut self, low: u64, high: u64, between: u64) {
        let width = u64::BITS - (high - low).leading_zeros();
        let Wanted { room, .. } = self.wanted;
        let keeps = low == high || (room > 0 && between <= room);
        self.interval = if keeps {
            Interval { low, high, shift: width.saturating_sub(u32::BITS), look: Look::Keys }
        } else {
            let shift = width.saturating_sub(BINS_LOG2);
            let bins = ((high - low) >> shift) as usize + 1;
            Interval { low, high, shift, look: Look::Bins(bins) }
        };
        self.above = 0;
        self.bins = match self.interval.look {
            Look::Bins(bins) => vec![0; bins],
            Look::Keys => Vec::new(),
        };
        (self.kept, self.has_all_keys) = (Vec::new(), true);
    }

    pub(crate) fn add(&mut self, counted: Counted) {
        self.above += counted.above;
        for (bin, count) in self.bins.iter_mut().zip(counted.bins) {
            *bin += u64::from(count);
        }
        self.has_all_keys &= counted.has_all_keys;
        self.kept.push(counted.kept);
        let kept: usize = self.kept.iter().map(|kept| kept.keys.len()).sum();
        if !self.has_all_keys || kept as u64 > self.wanted.room {
            self.has_all_keys = false;
            self.kept.iter_mut().for_each(|kept| kept.keys = Vec::new());
        }
    }

    /// Takes stock after a pass over the whole tensor.
    pub(crate) fn advance(&mut self) -> Progress {
        match self.interval.look {
            Look::Bins(_) => self.narrow_to_a_bin(),
            Look::Keys => self.choose_among_kept(),
        }
    }

    /// The rank among what is not above the interval. If the guess was wrong, the interval becomes
    /// the keys above.
    fn wanted_below_high(&mut self) -> Option<u64> {
        let Wanted { rank, largest_key, .. } = self.wanted;
        if rank > self.above {
            return Some(rank - self.above);
        }
        self.look_in(self.interval.high + 1, largest_key, self.above);
        None
    }

    /// The guess was wrong: `seen` elements lie above the low end or on it.
    fn look_below(&mut self, seen: u64) -> Progress {
        self.look_in(0, self.interval.low - 1, self.wanted.elements - seen);
        Progress::Again
    }

    fn narrow_to_a_bin(&mut self) -> Progress {
        let Some(mut wanted) = self.wanted_below_high() else { return Progress::Again };
        for (bin, &count) in self.bins.iter().enumerate().rev() {
            if wanted <= count {
                self.narrow(bin as u64, count);
                return Progress::Again;
            }
            wanted -= count;
        }
        self.look_below(self.wanted.rank - wanted)
    }

    /// Looks next at the `count` elements whose distance to the low end is `bin` when shifted.
    fn narrow(&mut self, bin: u64, count: u64) {
        let Interval { low, high, shift, .. } = self.interval;
        let low = low + (bin << shift);
        // The last bin may reach beyond the greatest number: keys of f64 are of 64 bits.
        self.look_in(low, high.min(low.saturating_add((1_u64 << shift) - 1)), count);
    }

    fn choose_among_kept(&mut self) -> Progress {
        let Interval { low, high, shift, .. } = self.interval;
        let count = |of: fn(&InBlock) -> u32| -> u64 {
            let blocks = self.kept.iter().flat_map(|kept| &kept.blocks);
            blocks.map(|block| u64::from(of(block))).sum()
        };
        let (on_high, on_low) = (count(|block| block.high), count(|block| block.low));
        let between = count(|block| block.between);
        let above = self.above;
        let Some(mut wanted) = self.wanted_below_high() else { return Progress::Again };
        if wanted <= on_high {
            return self.cut(high, wanted, on_high, |_, block| block.high);
        }
        wanted -= on_high;
        if wanted > between {
            wanted -= between;
            return if wanted <= on_low {
                self.cut(low, wanted, on_low, |_, block| block.low)
            } else {
                self.look_below(above + on_high + between + on_low)
            };
        }
        if !self.has_all_keys {
            self.wanted.room = 0;
            self.look_in(low + 1, high - 1, between);
            return Progress::Again;
        }
        let (offset, before) = self.largest(wanted);
        let equals = |keys: &[u32]| keys.iter().filter(|&&key| key == offset).count();
        let all: usize = self.kept.iter().map(|kept| equals(&kept.keys)).sum();
        if shift > 0 {
            self.narrow(u64::from(offset), all as u64);
            return Progress::Again;
        }
        self.cut(low + u64::from(offset), wanted - before, all as u64, |keys, _| {
            equals(keys) as u32
        })
    }

    /// The `nth` largest of the kept keys, and how many are larger.
    ///
    /// Digit by digit, which takes no memory, until few keys begin with the digits that are known:
    /// those are copied and selected from. Of a small tensor all keys are few.
    fn largest(&self, mut nth: u64) -> (u32, u64) {
        const DIGIT: u32 = 8;
        const FEW: usize = 1 << 12;
        let (mut prefix, mut before) = (0_u32, 0);
        let mut left: usize = self.kept.iter().map(|kept| kept.keys.len()).sum();
        for shift in [3 * DIGIT, 2 * DIGIT, DIGIT, 0] {
            // 64 bits, so that the whole of a key can be shifted out.
            let rest = |key: u32| u64::from(key) >> shift >> DIGIT;
            let alike = self.kept.iter().flat_map(|kept| &kept.keys);
            let alike = alike.filter(|&&key| rest(key) == u64::from(prefix));
            if left <= FEW {
                let mut few: Vec<u32> = Vec::with_capacity(left);
                few.extend(alike);
                let at = nth as usize - 1;
                let key = *few.select_nth_unstable_by(at, |a, b| b.cmp(a)).1;
                let larger = few[..at].iter().filter(|&&other| other > key).count();
                return (key, before + larger as u64);
            }
            let mut counts = [0_u64; 1 << DIGIT];
            alike.for_each(|key| counts[(key >> shift) as usize % (1 << DIGIT)] += 1);
            let mut digit = counts.len() - 1;
            while nth > counts[digit] {
                nth -= counts[digit];
                before += counts[digit];
                digit -= 1;
            }
            left = counts[digit] as usize;
            prefix = prefix << DIGIT | digit as u32;
        }
        (prefix, before)
    }

    /// `threshold` is the key: `wanted` of the `all` elements with it are kept; `equals` counts
    /// them in a block.
    fn cut(
        &mut self,
        threshold: u64,
        wanted: u64,
        all: u64,
        equals: impl Fn(&[u32], &InBlock) -> u32,
    ) -> Progress {
        let low = self.interval.low;
        (self.interval.low, self.interval.high) = (threshold, threshold);
        let done = |equals_end| Progress::Done(Chosen { threshold, equals_end });
        let kept = std::mem::take(&mut self.kept);
        if wanted == all {
            return done(u64::MAX);
        }
        let mut counts = Vec::new();
        for Kept { blocks, keys } in &kept {
            let mut keys = keys.as_slice();
            for block in blocks {
                let between = if self.has_all_keys { block.between as usize } else { 0 };
                let (own, rest) = keys.split_at(between);
                counts.push((block.block, u64::from(equals(own, block)), own));
                keys = rest;
            }
        }
        counts.sort_unstable();
        let mut nth = wanted;
        for (block, count, keys) in counts {
            if nth <= count {
                let first = block * BLOCK as u64;
                let elements = (self.wanted.elements - first).min(BLOCK as u64);
                // Where none lies on an end, the keys of a block are those of its elements in order.
                if keys.len() as u64 == elements {
                    let equal = |(_, key): &(u64, &u32)| low + u64::from(**key) == threshold;
                    let last = (first..).zip(keys).filter(equal).nth(nth as usize - 1);
                    return done(last.map_or(u64::MAX, |(index, _)| index + 1));
                }
                return Progress::Locate(LastKept { block, nth });
            }
            nth -= count;
        }
        done(u64::MAX)
    }

    /// The key that was found, when only an index is still looked for.
    pub(crate) fn threshold(&self) -> u64 {
        self.interval.low
    }

    /// The end: `index` is the flat index of the element that [`Progress::Locate`] asked for.
    pub(crate) fn located(&self, index: u64) -> Chosen {
        Chosen { threshold: self.threshold(), equals_end: index + 1 }
    }
}

impl Wanted {
    /// Brackets it by the keys of some runs of elements, which lie evenly over the tensor.
    ///
    /// Where many keys are equal, a sample also says up to which index about they are kept.
    pub(crate) fn guess(&self, sample: &[u64]) -> Guess {
        let size = sample.len() as f64;
        let share = self.rank as f64 / self.elements as f64;
        let mut ranked = sample.to_vec();
        let mut at = |place: f64| {
            let place = (place.max(0.0) as usize).min(sample.len() - 1);
            *ranked.select_nth_unstable_by(place, |a, b| b.cmp(a)).1
        };
        let middle = at(share * size);
        let deviation = (share * (1.0 - share) * size).sqrt().max(spread(sample, middle));
        let mut guesses = DEVIATIONS.into_iter().map(|times| {
            let slack = times * deviation + 2.0;
            let (first, end) = (share * size - slack, share * size + slack);
            let high = if first < 0.0 { self.largest_key } else { at(first) };
            let low = if end > size { 0 } else { at(end) };
            let between = sample.iter().filter(|&&key| low < key && key < high).count();
            let between = (between as f64 / size * self.elements as f64) as u64;
            let nothing = Chosen { threshold: self.largest_key, equals_end: 0 };
            let least = if first < 0.0 { nothing } else { self.cut(sample, high, first) };
            let everything = Chosen { threshold: 0, equals_end: u64::MAX };
            let most = if end > size { everything } else { self.cut(sample, low, end) };
            Guess { low, high, between, bracket: Bracket { least, most } }
        });
        let widest = guesses.next().expect("there is a widest guess");
        let fits = |guess: &Guess| guess.between <= self.room;
        if fits(&widest) { widest } else { guesses.find(fits).unwrap_or(widest) }
    }

    /// What is kept if the last that is kept is that of `place` in the order of `sample`, which has
    /// this `key`.
    fn cut(&self, sample: &[u64], key: u64, place: f64) -> Chosen {
        let stride = self.elements / (sample.len() / RUN) as u64;
        let index = |at: usize| (at / RUN) as u64 * stride + (at % RUN) as u64;
        let above = sample.iter().filter(|&&other| other > key).count();
        let equal = (0..sample.len()).filter(|&at| sample[at] == key);
        let last = equal.take((place as usize).saturating_sub(above) + 1).last();
        Chosen { threshold: key, equals_end: last.map_or(0, |at| index(at) + 1) }
    }
}

/// The standard deviation of how many elements of a sample lie above `middle`, seen from how much
/// its runs differ.
fn spread(sample: &[u64], middle: u64) -> f64 {
    let deviation = |is_above: &dyn Fn(u64) -> bool| {
        let share = |run: &[u64]| {
            run.iter().filter(|&&key| is_above(key)).count() as f64 / run.len() as f64
        };
        let shares: Vec<f64> = sample.chunks(RUN).map(share).collect();
        let count = shares.len() as f64;
        let mean = shares.iter().sum::<f64>() / count;
        let squares: f64 = shares.iter().map(|share| (share - mean).powi(2)).sum();
        (squares / (count - 1.0).max(1.0) / count).sqrt() * sample.len() as f64
    };
    deviation(&|key| key > middle).max(deviation(&|key| key >= middle))
}

impl Counted {
    /// Nothing counted yet of a unit of `elements`.
    pub(crate) fn new(interval: &Interval, elements: u64) -> Self {
        let (bins, room) = match interval.look {
            Look::Bins(bins) => (bins, 0),
            Look::Keys if interval.low == interval.high => (0, 0),
            Look::Keys => (0, most_at_once(elements)),
        };
        let kept = Kept { blocks: Vec::new(), keys: Vec::with_capacity(room as usize) };
        let most = most_in_a_unit(elements) as usize;
        Self { above: 0, bins: vec![0; bins], kept, has_all_keys: true, most }
    }

    /// Takes what a part of `block` has; `collect` adds the keys between the ends. If they are more
    /// than a unit may keep, none are kept.
    pub(crate) fn count(&mut self, block: u64, collect: impl FnOnce(&mut Vec<u32>) -> Ends) {
        let Kept { blocks, keys } = &mut self.kept;
        let before = keys.len();
        let ends = collect(keys);
        let between = (keys.len() - before) as u32;
        self.has_all_keys &= keys.len() <= self.most;
        self.above += ends.above;
        let (high, low) = (ends.high as u32, ends.low as u32);
        match blocks.last_mut() {
            Some(last) if last.block == block => {
                last.high += high;
                last.low += low;
                last.between += between;
            }
            _ => blocks.push(InBlock { block, high, low, between }),
        }
        if !self.has_all_keys {
            keys.clear();
        }
    }

    /// Gives back what was reserved and not used.
    pub(crate) fn shrink(&mut self) {
        self.kept.keys.shrink_to_fit();
    }
}

/// The ordinal that an order key stands for: of f64 if `double`, else of f32.
pub(crate) fn ordinal_of_key(key: u64, double: bool) -> i64 {
    if double { key.wrapping_sub(1 << 63).cast_signed() } else { key.cast_signed() - (1 << 31) }
}

/// The value whose order key is `key`, in f64 if `double`, else in f32.
pub(crate) fn value_of_key(key: u64, double: bool) -> f64 {
    let ordinal = ordinal_of_key(key, double);
    let bits = ordinal.unsigned_abs();
    let magnitude =
        if double { f64::from_bits(bits) } else { f64::from(f32::from_bits(bits as u32)) };
    if ordinal < 0 { -magnitude } else { magnitude }
}
