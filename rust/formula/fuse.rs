//! Fusion: one peephole over the instructions of a program.
//!
//! A merge's speed is that of memory only if each element goes through the cache once. So effects
//! whose whole computation has a kernel from bytes to bytes become one [`Fused`] effect, and pairs
//! of instructions that belong together become one. Each match looks at the instructions that an
//! operand is made of and at nothing else: what other effects there are does not matter. Then what
//! nobody needs any more goes. The bits are those of the instructions replaced; only what a bench
//! showed to be worth it is here.

use crate::dtype::DType;
use crate::kernels::Votes;

use super::program::{
    Along, Argument, BracketedVector, Effect, Fused, Keep, Operation, Setting, Slot, TaskVector,
    ThinnedSum, ThinnedVector,
};
use super::selection::Look;
use super::{BinaryOp, ReductionKind, UnaryOp};

/// Terms that one kernel takes.
const MOST_THINNED: usize = 3;

/// The same program with fewer instructions.
pub(crate) fn fused(
    operations: Vec<Operation>,
    effects: Vec<Effect>,
    along: Along,
    setting: &Setting,
) -> (Vec<Operation>, Vec<Effect>) {
    let code = Code { operations: &operations, along, setting };
    // The kernels from bytes are of f32.
    let effects = if setting.double { effects } else { code.fused_effects(effects) };
    let needed = without_dead(operations, effects);
    let (mut operations, effects) = needed;
    join_instructions(&mut operations);
    without_dead(operations, effects)
}

/// Drops the instructions whose results nobody uses.
fn without_dead(
    mut operations: Vec<Operation>,
    mut effects: Vec<Effect>,
) -> (Vec<Operation>, Vec<Effect>) {
    let mut used = vec![false; operations.len()];
    effects.iter_mut().for_each(|effect| effect.each_slot(|slot| used[*slot] = true));
    for at in (0..operations.len()).rev() {
        if used[at] {
            operations[at].each_slot(|slot| used[*slot] = true);
        }
    }
    let mut home = Vec::with_capacity(used.len());
    let mut kept = 0;
    for &used in &used {
        home.push(kept);
        kept += usize::from(used);
    }
    let mut is_used = used.into_iter();
    operations.retain(|_| is_used.next().unwrap_or(true));
    operations.iter_mut().for_each(|operation| operation.each_slot(|slot| *slot = home[*slot]));
    effects.iter_mut().for_each(|effect| effect.each_slot(|slot| *slot = home[*slot]));
    (operations, effects)
}

/// Replaces instructions by ones that do two or three steps.
fn join_instructions(operations: &mut [Operation]) {
    let mut uses = vec![0; operations.len()];
    operations.iter_mut().for_each(|operation| operation.each_slot(|slot| uses[*slot] += 1));
    for at in 0..operations.len() {
        let joined = match &operations[at] {
            Operation::Binary {
                op: BinaryOp::Sub,
                a: Argument::Slot(x),
                b: Argument::Slot(base),
            } => match operations[*x] {
                Operation::Load { input } if uses[*x] == 1 && x != base => {
                    Some(Operation::LoadDifference { input, base: *base })
                }
                _ => None,
            },
            Operation::Select { mask, yes: Argument::Slot(a), no } if is_zero(*no) => {
                match operations[*mask] {
                    Operation::Mask { mask } => Some(Operation::Drop { a: *a, mask, scale: 1.0 }),
                    Operation::Kept { a: magnitude, which } => match operations[magnitude] {
                        Operation::Unary { op: UnaryOp::Abs, a: of } if of == *a => {
                            Some(Operation::Trim { a: *a, which })
                        }
                        _ => None,
                    },
                    _ => None,
                }
            }
            Operation::WeightedSum { terms } => match terms.as_slice() {
                &[(scale, slot)] => match operations[slot] {
                    Operation::Drop { a, mask, scale: 1.0 } => {
                        Some(Operation::Drop { a, mask, scale })
                    }
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        };
        if let Some(joined) = joined {
            operations[at] = joined;
        }
    }
}

/// Whether it is +0.
fn is_zero(argument: Argument) -> bool {
    matches!(argument, Argument::Number(zero) if zero == 0.0 && zero.is_sign_positive())
}

/// Instructions in single-assignment form, to look at.
struct Code<'a> {
    operations: &'a [Operation],
    along: Along,
    setting: &'a Setting,
}

impl Code<'_> {
    fn fused_effects(&self, effects: Vec<Effect>) -> Vec<Effect> {
        let effects =
            effects.into_iter().map(|effect| self.one(&effect).map_or(effect, Effect::Fused));
        match self.along {
            Along::Segments(_) => {
                let effects = self.with_bracket(effects.collect());
                let effects = self.with_products(self.with_norms(effects));
                self.with_differences(effects)
            }
            Along::Columns => effects.collect(),
        }
    }

    /// What an effect becomes by itself.
    fn one(&self, effect: &Effect) -> Option<Fused> {
        match *effect {
            // The kernels that reduce do not do so by column.
            Effect::Reduce { .. } if self.along == Along::Columns => None,
            Effect::Store { output, dtype, a } if dtype.is_float() => self.store(output, dtype, a),
            Effect::Count { search, interval, a } if interval.look == Look::Keys => {
                let Operation::Unary { op: UnaryOp::Abs, a } = self.at(a)? else { return None };
                Some(Fused::Count { search, interval, vector: self.task_vector(*a)? })
            }
            Effect::Reduce {
                number,
                kind: ReductionKind::AbsoluteSum,
                a: Argument::Slot(a),
                ..
            } => {
                let (whole, Keep::Masked(mask)) = self.kept(a)? else { return None };
                let vector = self.task_vector(whole)?;
                Some(Fused::Norms { whole: None, kept: number, vector, mask })
            }
            _ => None,
        }
    }

    /// Gives the norms of whole task vectors to effects that have the vector at hand.
    fn with_norms(&self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let mut at = 0;
        while at < effects.len() {
            let norm = match effects[at] {
                Effect::Reduce {
                    number,
                    kind: ReductionKind::AbsoluteSum,
                    a: Argument::Slot(a),
                    ..
                } => self.task_vector(a).map(|vector| (number, vector)),
                _ => None,
            };
            let taken = norm.is_some_and(|(number, of)| {
                effects.iter_mut().any(|effect| match effect {
                    Effect::Fused(Fused::Norms { whole: whole @ None, vector, .. })
                        if *vector == of =>
                    {
                        *whole = Some(number);
                        true
                    }
                    _ => false,
                })
            });
            if taken {
                effects.remove(at);
            } else {
                at += 1;
            }
        }
        effects
    }

    /// Makes what is stored of elements between two cuts and the counts for the searches between these
    /// one effect, before others need what the cuts keep.
    fn with_bracket(&self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let stored = effects.iter().enumerate().find_map(|(at, effect)| match *effect {
            Effect::Store { output, dtype: DType::Bool, a } => Some((at, output, self.between(a)?)),
            _ => None,
        });
        let Some((at, output, between)) = stored else { return effects };
        let counted = |effect: &Effect| match *effect {
            Effect::Fused(Fused::Count { search, vector, .. }) => Some((search, vector)),
            _ => None,
        };
        // Both are in the order of the selections.
        let counts: Vec<_> = effects.iter().filter_map(counted).collect();
        let is_counted = counts.iter().map(|(_, vector)| vector);
        if !is_counted.eq(between.iter().map(|(vector, _)| vector)) {
            return effects;
        }
        let both = counts.iter().zip(&between);
        let vectors = both.map(|(&(search, vector), &(_, [least, most]))| BracketedVector {
            vector,
            search,
            least,
            most,
        });
        let vectors = vectors.collect();
        effects.remove(at);
        effects.retain(|effect| counted(effect).is_none());
        effects.insert(0, Effect::Fused(Fused::Bracket { output, vectors }));
        effects
    }

    /// Makes three inner products of two inputs one effect.
    fn with_products(&self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let factors = |effect: &Effect| match *effect {
            Effect::Reduce { number, kind: ReductionKind::Dot, a, b: Some(b) } => {
                Some((number, self.input(a)?, self.input(b)?))
            }
            _ => None,
        };
        loop {
            let dots: Vec<_> = effects.iter().filter_map(factors).collect();
            let number = |x, y| dots.iter().find(|dot| (dot.1, dot.2) == (x, y)).map(|dot| dot.0);
            let triple = dots.iter().filter(|(_, a, b)| a != b && self.are_alike(*a, *b));
            let triple =
                triple.map(|&(ab, a, b)| Some(([number(a, a)?, ab, number(b, b)?], [a, b])));
            let Some((numbers, inputs)) = triple.flatten().next() else { return effects };
            let is_part = |effect: &Effect| matches!(effect, Effect::Reduce { number, .. } if numbers.contains(number));
            effects.retain(|effect| !is_part(effect));
            effects.push(Effect::Fused(Fused::Products { numbers, inputs }));
        }
    }

    /// Makes the products of two inputs and all else about how they differ one effect.
    fn with_differences(&self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let products = |effect: &Effect| match *effect {
            Effect::Fused(Fused::Products { numbers, inputs }) => Some((numbers, inputs)),
            _ => None,
        };
        let all: Vec<_> = effects.iter().filter_map(products).collect();
        for ([aa, ab, bb], inputs @ [x, y]) in all {
            let number = |is_so: &dyn Fn(ReductionKind, Slot, Option<Argument>) -> bool| {
                effects.iter().find_map(|effect| match *effect {
                    Effect::Reduce { number, kind, a: Argument::Slot(a), b } => {
                        is_so(kind, a, b).then_some(number)
                    }
                    _ => None,
                })
            };
            let is_difference = |slot| self.difference(slot) == Some(TaskVector { x: y, base: x });
            let same = number(&|kind, a, _| {
                let is_zero = |slot| self.is_compared_with_zero(slot).is_some_and(is_difference);
                kind == ReductionKind::Sum && is_zero(a)
            });
            let dd = number(&|kind, a, b| {
                let is_square = b == Some(Argument::Slot(a));
                kind == ReductionKind::Dot && is_square && is_difference(a)
            });
            let largest = number(&|kind, a, _| {
                let Operation::Unary { op: UnaryOp::Abs, a } = self.operations[a] else {
                    return false;
                };
                kind == ReductionKind::Max && is_difference(a)
            });
            let flips = number(&|kind, a, _| kind == ReductionKind::Sum && self.is_flip(a, inputs));
            let (Some(same), Some(dd), Some(largest), Some(flips)) = (same, dd, largest, flips)
            else {
                continue;
            };
            let numbers = [same, dd, aa, ab, bb, largest, flips];
            effects.retain(|effect| match effect {
                Effect::Reduce { number, .. } => !numbers.contains(number),
                effect => products(effect) != Some(([aa, ab, bb], inputs)),
            });
            effects.push(Effect::Fused(Fused::Differences { numbers, inputs }));
        }
        effects
    }

    /// What a slot tells of whether it is zero.
    fn is_compared_with_zero(&self, slot: Slot) -> Option<Slot> {
        match self.operations[slot] {
            Operation::Binary { op: BinaryOp::Equal, a: Argument::Slot(a), b } => {
                self.is_nothing(b).then_some(a)
            }
            _ => None,
        }
    }

    /// Whether a slot tells where two inputs have opposite signs.
    fn is_flip(&self, slot: Slot, [x, y]: [usize; 2]) -> bool {
        let sign = |argument: Argument| match self.at(argument)? {
            Operation::Unary { op: UnaryOp::Sign, a } => self.input(Argument::Slot(*a)),
            _ => None,
        };
        let Operation::Binary { op: BinaryOp::Greater, a, b } = self.operations[slot] else {
            return false;
        };
        let Some(Operation::Binary { op: BinaryOp::Mul, a: one, b: other }) = self.at(b) else {
            return false;
        };
        self.is_nothing(a) && (sign(*one), sign(*other)) == (Some(x), Some(y))
    }

    /// Whether it is zero everywhere.
    fn is_nothing(&self, argument: Argument) -> bool {
        match self.at(argument) {
            Some(Operation::Fill { number }) => is_zero(Argument::Number(*number)),
            _ => is_zero(argument),
        }
    }

    fn store(&self, output: usize, dtype: DType, a: Argument) -> Option<Fused> {
        match self.at(a)? {
            Operation::WeightedSum { terms } => {
                let inputs = terms.iter().map(|&(c, x)| Some((c, self.input(Argument::Slot(x))?)));
                let terms = inputs.collect::<Option<_>>()?;
                Some(Fused::WeightedSum { output, dtype, terms })
            }
            Operation::Binary { op: BinaryOp::Add, a: base, b: Argument::Slot(sum) } => {
                let base = self.input(*base)?;
                self.shifted(output, dtype, base, *sum)
                    .or_else(|| self.thinned(output, dtype, base, *sum))
            }
            _ => None,
        }
    }

    fn shifted(&self, output: usize, dtype: DType, base: usize, sum: Slot) -> Option<Fused> {
        let (scale, sum) = self.scaled_sum(sum);
        let Operation::WeightedSum { terms } = &self.operations[sum] else { return None };
        let term = |&(c, slot): &(f64, Slot)| Some((c, self.moved_from(base, slot)?));
        let terms = terms.iter().map(term).collect::<Option<_>>()?;
        Some(Fused::Shifted { output, dtype, base, terms, scale })
    }

    fn thinned(&self, output: usize, dtype: DType, base: usize, sum: Slot) -> Option<Fused> {
        let (lambda, sum) = self.scaled_sum(sum);
        let (votes, terms) = match &self.operations[sum] {
            Operation::Elect { terms, average: true } => (Votes::Average, terms),
            Operation::Elect { terms, average: false } => (Votes::Elect, terms),
            Operation::WeightedSum { terms } => (Votes::None, terms),
            _ => return None,
        };
        let has_type = |input: usize| self.setting.inputs[input] == dtype;
        let term = |&(weight, slot): &(f64, Slot)| {
            let (scale, slot) = self.scaled(slot);
            let (whole, keep) = self.kept(slot).unwrap_or((slot, Keep::All));
            let x = self.moved_from(base, whole).filter(|&x| has_type(x))?;
            Some(ThinnedVector { weight, scale, x, keep })
        };
        let terms: Vec<_> = terms.iter().map(term).collect::<Option<_>>()?;
        let fits = has_type(base) && terms.len() <= MOST_THINNED;
        let sum = ThinnedSum { base, terms, votes, lambda };
        fits.then_some(Fused::Thinned { output, dtype, sum })
    }

    /// The task vectors of which a slot says where a second selection keeps the magnitude and a first
    /// one does not, added up.
    fn between(&self, argument: Argument) -> Option<Vec<(TaskVector, [usize; 2])>> {
        match *self.at(argument)? {
            Operation::Binary { op: BinaryOp::Add, a, b } => {
                Some([self.between(a)?, self.between(b)?].concat())
            }
            Operation::Binary { op: BinaryOp::Sub, a, b } => {
                let (Operation::Kept { a: magnitude, which: most }, Operation::Kept { a, which }) =
                    (self.at(a)?, self.at(b)?)
                else {
                    return None;
                };
                let Operation::Unary { op: UnaryOp::Abs, a: vector } = self.operations[*magnitude]
                else {
                    return None;
                };
                let vector = self.task_vector(vector).filter(|_| a == magnitude)?;
                Some(vec![(vector, [*which, *most])])
            }
            _ => None,
        }
    }

    fn at(&self, argument: Argument) -> Option<&Operation> {
        match argument {
            Argument::Slot(slot) => Some(&self.operations[slot]),
            Argument::Number(_) => None,
        }
    }

    fn input(&self, argument: Argument) -> Option<usize> {
        match self.at(argument)? {
            Operation::Load { input } => Some(*input),
            _ => None,
        }
    }

    /// x and base, if a slot has the difference of two inputs.
    fn difference(&self, slot: Slot) -> Option<TaskVector> {
        match self.operations[slot] {
            Operation::Binary { op: BinaryOp::Sub, a, b } => {
                Some(TaskVector { x: self.input(a)?, base: self.input(b)? })
            }
            _ => None,
        }
    }

    /// The same, if they are of one type.
    fn task_vector(&self, slot: Slot) -> Option<TaskVector> {
        self.difference(slot).filter(|vector| self.are_alike(vector.x, vector.base))
    }

    fn are_alike(&self, a: usize, b: usize) -> bool {
        self.setting.inputs[a] == self.setting.inputs[b]
    }

    /// x, if a slot has x − base.
    fn moved_from(&self, base: usize, slot: Slot) -> Option<usize> {
        self.difference(slot).filter(|vector| vector.base == base).map(|vector| vector.x)
    }

    /// The whole and what is kept of it, if a slot has a part of another, else 0.
    fn kept(&self, slot: Slot) -> Option<(Slot, Keep)> {
        let Operation::Select { mask, yes: Argument::Slot(whole), no } = self.operations[slot]
        else {
            return None;
        };
        let keep = match self.operations[mask] {
            Operation::Mask { mask } => Keep::Masked(mask),
            Operation::Kept { a, which } => match self.operations[a] {
                Operation::Unary { op: UnaryOp::Abs, a } if a == whole => Keep::Largest(which),
                _ => return None,
            },
            _ => return None,
        };
        is_zero(no).then_some((whole, keep))
    }

    /// A slot as a number times another.
    fn scaled(&self, slot: Slot) -> (f64, Slot) {
        match &self.operations[slot] {
            Operation::WeightedSum { terms } => match terms.as_slice() {
                [term] => *term,
                _ => (1.0, slot),
            },
            _ => (1.0, slot),
        }
    }

    /// A slot as a number times another sum.
    fn scaled_sum(&self, slot: Slot) -> (f64, Slot) {
        let (scale, inner) = self.scaled(slot);
        match self.operations[inner] {
            Operation::WeightedSum { .. } | Operation::Elect { .. } => (scale, inner),
            _ => (1.0, slot),
        }
    }
}
