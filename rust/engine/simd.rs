//! The backend of every CPU: runs programs chunk by chunk in [`Machine`]s, fused effects from bytes
//! to bytes.

use std::ops::Range;

use super::backend::{Arithmetic, Backend, Results, Run, Step, fold, max, start_of, steps};
use crate::dtype::DType;
use crate::error::Result;
use crate::formula::machine::{CHUNK, InputBytes, Known, Machine, RANKED_TOGETHER, TensorFrame};
use crate::formula::program::{
    Along, BracketedVector, Effect, Fused, Keep, Mask, Program, TaskVector, ThinnedSum,
};
use crate::formula::selection::{Counted, Interval, Look};
use crate::formula::{Among, Chosen, Pick, ReductionKind};
use crate::kernels::{
    self, BLOCK, Counts, Cuts, Differences, Ends, LANES, Lanes, Level, MaskBits, MaskKey, Picked,
    Ranker, Real, SPAN, ThinnedTerm,
};

/// The kernels of one instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Simd(pub(crate) Level);

impl Backend for Simd {
    fn worker(&self) -> Result<Box<dyn Arithmetic + '_>> {
        Ok(Box::new(*self))
    }
}

impl Arithmetic for Simd {
    fn begin<'a>(
        &self,
        frame: &'a TensorFrame,
        program: &'a Program,
        known: &'a Known,
    ) -> Result<Box<dyn Run + 'a>> {
        Ok(if program.double {
            Box::new(Machine::<f64>::new(self.0, frame, program, known))
        } else {
            Box::new(Machine::<f32>::new(self.0, frame, program, known))
        })
    }
}

impl<T: Real> Run for Machine<'_, T> {
    fn run(&mut self, step: &Step<'_>, results: &mut Results<'_>) -> Result<()> {
        let among = self.program.effects.iter().filter_map(|effect| match effect {
            Effect::Rank { among, .. } => Some(*among),
            _ => None,
        });
        // What is reduced beside a ranking is reduced by row.
        let rows = (!self.program.kinds.is_empty()).then_some(Among::Row);
        let among: Vec<Among> = among.chain(rows).collect();
        let widest = (self.program.rankings > 0).then(|| self.frame.widest(&among)).flatten();
        let Some(spans) = widest else {
            self.part(step, &step.elements, &mut [], results);
            return Ok(());
        };
        let mut ordinals = vec![Vec::new(); self.program.rankings];
        let (mut ranker, mut draws) = (Ranker::new(self.level()), Vec::new());
        let Range { mut start, end } = step.elements;
        while start < end {
            let part = spans.whole(&(start..(start + RANKED_TOGETHER).min(end)), end);
            let count = (part.end - part.start) as usize;
            ordinals.iter_mut().for_each(|own| own.resize(count, T::ZERO.ordinal()));
            self.part(step, &part, &mut ordinals, results);
            self.rank(&part, &ordinals, &mut ranker, &mut draws, results);
            start = part.end;
        }
        Ok(())
    }
}

impl<T: Real> Machine<'_, T> {
    /// Computes the effects on a part of a step, but for rankings: of what these look at, it writes the
    /// ordinals.
    fn part(
        &mut self,
        step: &Step<'_>,
        part: &Range<u64>,
        ordinals: &mut [Vec<T::Ordinal>],
        results: &mut Results<'_>,
    ) {
        let kinds = &self.program.kinds;
        let segment = match self.program.along {
            Along::Segments(length) => length,
            Along::Columns => u64::MAX,
        };
        // What runs from bytes to bytes needs no buffers, and so no chunks.
        let chunk = if self.program.instructions.is_empty() { segment } else { CHUNK as u64 };
        let at = |element: u64| (element - part.start) as usize;
        let mut kept = KeptByCuts::default();
        for segment in steps(part.clone(), segment) {
            let mut lanes: Vec<Lanes> = kinds.iter().map(|&kind| [start_of(kind); LANES]).collect();
            for chunk in steps(segment, chunk) {
                kept.clear();
                self.compute(&chunk, step.inputs, step.given);
                for effect in &self.program.effects {
                    match effect {
                        Effect::Rank { ranking, a, .. } => {
                            let out = &mut ordinals[*ranking][at(chunk.start)..at(chunk.end)];
                            kernels::ordinals(self.level(), &self.chunk(*a), out);
                        }
                        _ => apply(self, effect, step, &chunk, (&mut lanes, &mut kept), results),
                    }
                }
            }
            if matches!(self.program.along, Along::Segments(_)) {
                for (numbers, (lanes, &kind)) in
                    results.numbers.iter_mut().zip(lanes.iter().zip(kinds))
                {
                    numbers.push(fold(kind, &mut lanes.to_vec()));
                }
            }
        }
    }

    /// Adds what each ranking keeps of `elements`, which are whole vectors and have these ordinals.
    fn rank(
        &self,
        elements: &Range<u64>,
        ordinals: &[Vec<T::Ordinal>],
        ranker: &mut Ranker<T::Ordinal>,
        draws: &mut Vec<u32>,
        results: &mut Results<'_>,
    ) {
        for effect in &self.program.effects {
            let Effect::Rank { ranking, among, pick, .. } = *effect else { continue };
            let (spans, ordinals) = (self.frame.spans(among), &ordinals[ranking]);
            draws.clear();
            if let Pick::Random { stream, .. } = pick {
                draws.resize(ordinals.len(), 0);
                kernels::draws(self.level(), &self.keys[&stream], elements.start, draws);
            }
            let kept = &mut results.kept[ranking];
            let before = kept.len();
            kept.resize(before + ordinals.len(), 0);
            for span in spans.each(elements) {
                let at = |element: u64| (element - elements.start) as usize;
                let own = at(span.start)..at(span.end);
                let picked = picked(pick, draws.get(own.clone()).unwrap_or_default());
                let kept = &mut kept[before..][own.clone()];
                ranker.pick(&ordinals[own], spans.stride as usize, picked, kept);
            }
        }
    }
}

/// The draws of some elements, if `pick` is at random.
pub(super) fn draws_of(
    level: Level,
    pick: Pick,
    key: impl Fn(u32) -> MaskKey,
    parts: impl Iterator<Item = Range<u64>>,
) -> Vec<u32> {
    let mut draws = Vec::new();
    if let Pick::Random { stream, .. } = pick {
        for part in parts {
            let before = draws.len();
            draws.resize(before + (part.end - part.start) as usize, 0);
            kernels::draws(level, &key(stream), part.start, &mut draws[before..]);
        }
    }
    draws
}

/// `pick`, with the draws that it needs.
pub(super) fn picked(pick: Pick, draws: &[u32]) -> Picked<'_> {
    match pick {
        Pick::Largest(count) => Picked::Largest(count),
        Pick::Random { lowest, highest, .. } => Picked::Random { lowest, highest, draws },
    }
}

/// What selections keep of the spans of a chunk, where an effect has noted it.
type KeptByCuts = Vec<(usize, Vec<MaskBits>)>;

/// Does what `effect` is to do with the elements `chunk`.
fn apply<T: Real>(
    machine: &Machine<'_, T>,
    effect: &Effect,
    step: &Step<'_>,
    chunk: &Range<u64>,
    (lanes, kept): (&mut [Lanes], &mut KeptByCuts),
    results: &mut Results<'_>,
) {
    let level = machine.level();
    match effect {
        // Done by who has the bytes, and when all are at hand.
        Effect::Copy { .. } | Effect::Rank { .. } => {}
        Effect::Store { output, dtype, a } => {
            let out = part(results.outputs[*output], *dtype, step, chunk);
            if *dtype == DType::Bool {
                kernels::narrow_to_bool(level, &machine.chunk(*a), out);
            } else {
                kernels::narrow(level, &machine.chunk(*a), *dtype, out);
            }
        }
        Effect::Reduce { number, kind, a, b } => {
            let (a, b) = (machine.chunk(*a), machine.chunk(b.unwrap_or(*a)));
            match machine.program.along {
                Along::Segments(_) => add_to_lanes(level, *kind, &a, &b, &mut lanes[*number]),
                Along::Columns => {
                    let first = step.column + chunk.start - step.elements.start;
                    add_to_columns(*kind, &a, &b, first, &mut results.numbers[*number]);
                }
            }
        }
        Effect::Differing { number, inputs: [a, b] } => {
            let ((dtype, a), (_, b)) =
                (stored(step.inputs, *a, chunk), stored(step.inputs, *b, chunk));
            lanes[*number][0] += kernels::differing(level, dtype.size(), a, b) as f64;
        }
        Effect::Count { search, interval, a } => {
            let block = chunk.start / BLOCK as u64;
            count(level, interval, &machine.chunk(*a), block, &mut results.counts[*search]);
        }
        Effect::Keys { sample, a } => {
            let values = machine.chunk(*a);
            results.keys[*sample].extend(values.iter().map(|value| value.key()));
        }
        Effect::Fused(fused) => apply_fused(machine, fused, step, chunk, (lanes, kept), results),
    }
}

/// The bytes of the elements `chunk` in an output.
fn part<'a>(
    output: &'a mut [u8],
    dtype: DType,
    step: &Step<'_>,
    chunk: &Range<u64>,
) -> &'a mut [u8] {
    let at = |element: u64| (element - step.elements.start) as usize * dtype.size();
    &mut output[at(chunk.start)..at(chunk.end)]
}

fn add_to_lanes<T: Real>(level: Level, kind: ReductionKind, a: &[T], b: &[T], lanes: &mut Lanes) {
    match kind {
        ReductionKind::Sum => kernels::sum_into(level, a, lanes),
        ReductionKind::AbsoluteSum => kernels::absolute_sum_into(level, a, lanes),
        ReductionKind::Max => kernels::max_into(level, a, lanes),
        ReductionKind::Dot => kernels::dot_into(level, a, b, lanes),
        ReductionKind::Differing => unreachable!("stored bits are compared by another effect"),
    }
}

fn add_to_columns<T: Real>(kind: ReductionKind, a: &[T], b: &[T], first: u64, sums: &mut [f64]) {
    let line = sums.len();
    for (offset, (a, b)) in a.iter().zip(b).enumerate() {
        let sum = &mut sums[(first as usize + offset) % line];
        *sum = match kind {
            ReductionKind::Sum => *sum + a.to_f64(),
            ReductionKind::AbsoluteSum => *sum + a.to_f64().abs(),
            ReductionKind::Dot => *sum + a.to_f64() * b.to_f64(),
            ReductionKind::Max => max(*sum, a.to_f64()),
            ReductionKind::Differing => unreachable!("stored bits are compared over a tensor"),
        };
    }
}

fn count<T: Real>(
    level: Level,
    &Interval { low, high, shift, look }: &Interval,
    values: &[T],
    block: u64,
    counted: &mut Counted,
) {
    match look {
        Look::Bins(_) => {
            let bins = &mut counted.bins;
            counted.above += kernels::histogram(level, values, low, high, shift, bins).above;
        }
        Look::Keys if low == high => counted.count(block, |_| {
            let Counts { above, inside } = kernels::count(level, values, low, high);
            Ends { above, high: inside, low: 0 }
        }),
        Look::Keys => counted
            .count(block, |between| kernels::collect(level, values, low, high, shift, between)),
    }
}

/// Runs the kernel of a fused effect over the elements `chunk`.
fn apply_fused<T: Real>(
    machine: &Machine<'_, T>,
    fused: &Fused,
    step: &Step<'_>,
    chunk: &Range<u64>,
    (lanes, kept): (&mut [Lanes], &mut KeptByCuts),
    results: &mut Results<'_>,
) {
    let level = machine.level();
    let stored = |input: usize| stored(step.inputs, input, chunk);
    let term = |&(c, input): &(f64, usize)| {
        let (dtype, bytes) = stored(input);
        (f32::from_f64(c), dtype, bytes)
    };
    match fused {
        Fused::WeightedSum { output, dtype, terms } => {
            let terms: Vec<_> = terms.iter().map(term).collect();
            let out = part(results.outputs[*output], *dtype, step, chunk);
            kernels::weighted_sum_bytes(level, &terms, *dtype, out);
        }
        Fused::Shifted { output, dtype, base, terms, scale } => {
            let terms: Vec<_> = terms.iter().map(term).collect();
            let out = part(results.outputs[*output], *dtype, step, chunk);
            let (base, scale) = (stored(*base), f32::from_f64(*scale));
            kernels::weighted_difference_sum_bytes(level, base, &terms, scale, *dtype, out);
        }
        Fused::Thinned { output, dtype, sum } => {
            let out = part(results.outputs[*output], *dtype, step, chunk);
            thinned(machine, sum, *dtype, step, chunk, kept, out);
        }
        Fused::Products { numbers, inputs: [a, b] } => {
            let ((dtype, a), (_, b)) = (stored(*a), stored(*b));
            let mut own = numbers.map(|number| lanes[number]);
            kernels::products_into(level, dtype, a, b, &mut own);
            numbers.iter().zip(own).for_each(|(&number, own)| lanes[number] = own);
        }
        Fused::Differences { numbers: [same, dd, aa, ab, bb, largest, flips], inputs: [a, b] } => {
            let ((dtype, a), (_, b)) = (stored(*a), stored(*b));
            let sums = [*dd, *aa, *ab, *bb];
            let own = sums.map(|number| lanes[number]);
            let mut found = Differences::from(own);
            kernels::differences_into(level, dtype, a, b, &mut found);
            sums.iter().zip(found.sums).for_each(|(&number, own)| lanes[number] = own);
            lanes[*same][0] += found.same as f64;
            lanes[*flips][0] += found.flips as f64;
            lanes[*largest][0] = max(lanes[*largest][0], found.largest());
        }
        Fused::Norms { whole, kept: of_kept, vector, mask } => {
            let mut own = [whole.map_or([0.0; LANES], |whole| lanes[whole]), lanes[*of_kept]];
            norms(machine, *vector, *mask, step, chunk, &mut own);
            whole.iter().for_each(|&whole| lanes[whole] = own[0]);
            lanes[*of_kept] = own[1];
        }
        Fused::Count { search, interval, vector } => {
            let counted = &mut results.counts[*search];
            let Interval { low, high, shift, .. } = *interval;
            let ((dtype, x), (_, base)) = (stored(vector.x), stored(vector.base));
            counted.count(chunk.start / BLOCK as u64, |between| {
                kernels::collect_magnitudes(level, dtype, x, base, low, high, shift, between)
            });
        }
        Fused::Bracket { output, vectors } => {
            let out = part(results.outputs[*output], DType::Bool, step, chunk);
            out.fill(0);
            for of in vectors {
                let counted = &mut results.counts[of.search];
                kept.push((of.least, bracket(machine, of, step.inputs, chunk, counted, out)));
            }
        }
    }
}

/// Counts the magnitudes of a task vector for a search, and marks what only the selection that keeps more
/// keeps of it. Gives what the other one does.
fn bracket<T: Real>(
    machine: &Machine<'_, T>,
    of: &BracketedVector,
    inputs: &[Option<InputBytes<'_>>],
    chunk: &Range<u64>,
    counted: &mut Counted,
    out: &mut [u8],
) -> Vec<MaskBits> {
    let (level, TaskVector { x, base }) = (machine.level(), of.vector);
    let [least, most] = [of.least, of.most].map(|which| machine.chosen(which));
    let each = steps(chunk.clone(), SPAN as u64).zip(out.chunks_mut(SPAN));
    let each = each.map(|(span, between)| {
        let ((dtype, x), (_, base)) = (stored(inputs, x, &span), stored(inputs, base, &span));
        let end = |cut: Chosen| cut.equals_end.saturating_sub(span.start).min(SPAN as u64) as usize;
        let ends = [end(least), end(most)];
        let cuts = Cuts { high: least.threshold, low: most.threshold, ends };
        let mut kept = [0; _];
        counted.count(span.start / BLOCK as u64, |keys| {
            let ends;
            (kept, ends) = kernels::bracket(level, dtype, x, base, cuts, between, keys);
            ends
        });
        kept
    });
    each.collect()
}

/// The type of an input, and its bytes of some elements.
fn stored<'a>(
    inputs: &[Option<InputBytes<'a>>],
    input: usize,
    elements: &Range<u64>,
) -> (DType, &'a [u8]) {
    let input = inputs[input].as_ref().expect("an input that the program uses was read");
    (input.dtype, input.part(elements))
}

fn norms<T: Real>(
    machine: &Machine<'_, T>,
    TaskVector { x, base }: TaskVector,
    mask: Mask,
    step: &Step<'_>,
    chunk: &Range<u64>,
    lanes: &mut [Lanes; 2],
) {
    let inputs = step.inputs;
    for span in steps(chunk.clone(), SPAN as u64) {
        let bits = machine.bits(mask, span.start, step.given);
        let ((dtype, x), (_, base)) = (stored(inputs, x, &span), stored(inputs, base, &span));
        kernels::norms_into(machine.level(), dtype, x, base, &bits, lanes);
    }
}

fn thinned<T: Real>(
    machine: &Machine<'_, T>,
    sum: &ThinnedSum,
    dtype: DType,
    step: &Step<'_>,
    chunk: &Range<u64>,
    kept: &KeptByCuts,
    out: &mut [u8],
) {
    let (level, inputs) = (machine.level(), step.inputs);
    let spans = steps(chunk.clone(), SPAN as u64).zip(out.chunks_mut(SPAN * dtype.size()));
    for (at, (span, out)) in spans.enumerate() {
        let base = stored(inputs, sum.base, &span).1;
        let bits = sum.terms.iter().map(|term| match term.keep {
            Keep::All => [u32::MAX; _],
            Keep::Masked(mask) => machine.bits(mask, span.start, step.given),
            Keep::Largest(which) => {
                if let Some((_, kept)) = kept.iter().find(|(other, _)| *other == which) {
                    return kept[at];
                }
                let Chosen { threshold, equals_end } = machine.chosen(which);
                let end = equals_end.saturating_sub(span.start).min(SPAN as u64) as usize;
                let x = stored(inputs, term.x, &span).1;
                kernels::mark_largest(level, dtype, x, base, threshold, end)
            }
        });
        let bits: Vec<MaskBits> = bits.collect();
        let terms = sum.terms.iter().zip(&bits).map(|(term, bits)| ThinnedTerm {
            weight: f32::from_f64(term.weight),
            scale: f32::from_f64(term.scale),
            input: stored(inputs, term.x, &span).1,
            bits,
        });
        let (terms, lambda): (Vec<_>, _) = (terms.collect(), f32::from_f64(sum.lambda));
        kernels::thinned_sum_bytes(level, dtype, base, &terms, sum.votes, lambda, out);
    }
}
