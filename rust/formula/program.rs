//! Programs: what a pass over a tensor computes, compiled when the pass is entered.
//!
//! A program is a list of vector instructions and the *effects* that they are for: storing,
//! reducing, counting. One instruction does one operation on a chunk of elements. It is compiled in
//! single-assignment form ([`compile`](super::compile)), where the slot of a result is the number of
//! its instruction; so [`fuse`](super::fuse) can see what is made of what. Then slots are allocated:
//! each is a buffer of one chunk, used again as soon as its value was used for the last time, so
//! that the whole working set stays in the first-level cache.
//!
//! Numbers by row or column that are not known before a step is computed are *vectors* of the
//! program, and what is kept of rankings are its *marks*: who runs it supplies both for each step
//! ([`Given`](super::compile::Given)). What selections and rankings of earlier passes keep is not in
//! the program either, but [`Known`](super::machine::Known) to who runs it: so tensors of which no
//! other numbers are needed share their programs.

use std::fmt;
use std::ops::Range;

use crate::dtype::DType;
use crate::kernels::Votes;

use super::selection::Interval;
use super::{Among, BinaryOp, MaskName, Pick, ReductionKind, Scalar, UnaryOp, Value};

/// The index of a buffer of one chunk.
pub(crate) type Slot = usize;

/// An operand: a chunk, or the same number for every element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Argument {
    Slot(Slot),
    Number(f64),
}

/// One step of the computation of a chunk.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    /// Widens a chunk of an input.
    Load {
        input: usize,
    },
    /// Widens a chunk of an input and subtracts a base: a task vector.
    LoadDifference {
        input: usize,
        base: Slot,
    },
    /// The same number everywhere.
    Fill {
        number: f64,
    },
    /// Repeats the numbers of a vector, one a row or column, over its elements.
    Spread {
        vector: usize,
    },
    Unary {
        op: UnaryOp,
        a: Slot,
    },
    Binary {
        op: BinaryOp,
        a: Argument,
        b: Argument,
    },
    Select {
        mask: Slot,
        yes: Argument,
        no: Argument,
    },
    WeightedSum {
        terms: Vec<(f64, Slot)>,
    },
    Elect {
        terms: Vec<(f64, Slot)>,
        average: bool,
    },
    /// 1 where a selection keeps an element, else 0.
    Kept {
        a: Slot,
        which: usize,
    },
    /// What a selection by magnitude keeps, else 0.
    Trim {
        a: Slot,
        which: usize,
    },
    /// 1 where a mask keeps an element, else 0.
    Mask {
        mask: Mask,
    },
    /// What a mask keeps, else 0, times a number.
    Drop {
        a: Slot,
        mask: Mask,
        scale: f64,
    },
}

/// A mask that has a bit an element.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mask {
    Random(MaskName),
    /// What was kept of elements that were ranked: which marks of the program.
    Marked(usize),
}

impl Mask {
    /// Its name, if it is drawn.
    fn random(self) -> Option<MaskName> {
        match self {
            Self::Random(name) => Some(name),
            Self::Marked(_) => None,
        }
    }
}

/// An operation and the slot its result goes to.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    pub(crate) out: Slot,
    /// Slots whose values nobody needs afterwards. A machine only writes over them.
    #[cfg_attr(not(feature = "python"), expect(dead_code, reason = "torch lets go of them"))]
    pub(crate) dead: Vec<Slot>,
}

/// What the instructions are for.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// Rounds a value to an output's type, and puts it there.
    Store { output: usize, dtype: DType, a: Argument },
    /// Puts the bytes of an input there, as they are.
    Copy { output: usize, input: usize },
    /// Summarises a value, or the products of two.
    Reduce { number: usize, kind: ReductionKind, a: Argument, b: Option<Argument> },
    /// Counts the elements of two inputs that are stored as other bits.
    Differing { number: usize, inputs: [usize; 2] },
    /// Counts for a search.
    Count { search: usize, interval: Interval, a: Argument },
    /// The order keys of each element. For the few elements of a sample, and of what is ranked.
    Keys { sample: usize, a: Argument },
    /// Ranks elements, of which a step has whole vectors.
    Rank { ranking: usize, among: Among, pick: Pick, a: Argument },
    /// Does the work of effects and of the instructions that they alone needed.
    Fused(Fused),
}

/// What is summarised by one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Along {
    /// Each so many elements, counted from the first of a step.
    Segments(u64),
    /// Each column, through all steps.
    Columns,
}

/// Of what a program is to be compiled.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// The types of the inputs.
    pub(crate) inputs: Vec<DType>,
    /// Whether the working type is f64.
    pub(crate) double: bool,
    /// Whether what has a kernel of its own is to use it; a device has none of them.
    pub(crate) fuses: bool,
}

/// An effect that has a kernel of its own.
#[derive(Clone, Debug)]
pub(crate) enum Fused {
    /// Stores Σ c·x.
    WeightedSum { output: usize, dtype: DType, terms: Vec<(f64, usize)> },
    /// Stores base + scale · Σ c·(x − base).
    Shifted { output: usize, dtype: DType, base: usize, terms: Vec<(f64, usize)>, scale: f64 },
    /// Stores base + lambda · (what is kept of weighted task vectors, summed or voted on).
    Thinned { output: usize, dtype: DType, sum: ThinnedSum },
    /// The inner products of two inputs: a·a, a·b, b·b.
    Products { numbers: [usize; 3], inputs: [usize; 2] },
    /// How input b differs from input a, d = b − a: how many d are zero, d·d, a·a, a·b, b·b, the largest
    /// |d|, and how many of a and b have opposite signs.
    Differences { numbers: [usize; 7], inputs: [usize; 2] },
    /// The L1 norms of a task vector, if it is wanted, and of what a mask keeps of it.
    Norms { whole: Option<usize>, kept: usize, vector: TaskVector, mask: Mask },
    /// Counts the magnitudes of a task vector for a search.
    Count { search: usize, interval: Interval, vector: TaskVector },
    /// Of task vectors of which a first selection keeps less than a second: counts the magnitudes for the
    /// searches between the two, notes what the first ones keep, and stores, as BOOL, where only a second
    /// one does.
    Bracket { output: usize, vectors: Vec<BracketedVector> },
}

/// A task vector, and by whose cuts it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BracketedVector {
    pub(crate) vector: TaskVector,
    pub(crate) search: usize,
    /// The selections that keep less and more.
    pub(crate) least: usize,
    pub(crate) most: usize,
}

/// x − base, of inputs of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskVector {
    pub(crate) x: usize,
    pub(crate) base: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct ThinnedSum {
    pub(crate) base: usize,
    pub(crate) terms: Vec<ThinnedVector>,
    pub(crate) votes: Votes,
    pub(crate) lambda: f64,
}

/// weight · scale · (what is kept of x − base).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThinnedVector {
    pub(crate) weight: f64,
    pub(crate) scale: f64,
    pub(crate) x: usize,
    pub(crate) keep: Keep,
}

/// What is kept of a task vector.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keep {
    All,
    Masked(Mask),
    /// The largest magnitudes: of which selection.
    Largest(usize),
}

impl Fused {
    /// The inputs that it reads.
    pub(crate) fn inputs(&self) -> Vec<usize> {
        match self {
            Self::WeightedSum { terms, .. } => terms.iter().map(|(_, x)| *x).collect(),
            Self::Shifted { base, terms, .. } => {
                terms.iter().map(|(_, x)| *x).chain([*base]).collect()
            }
            Self::Thinned { sum, .. } => {
                sum.terms.iter().map(|term| term.x).chain([sum.base]).collect()
            }
            Self::Products { inputs, .. } | Self::Differences { inputs, .. } => inputs.to_vec(),
            Self::Norms { vector, .. } | Self::Count { vector, .. } => vec![vector.x, vector.base],
            Self::Bracket { vectors, .. } => {
                vectors.iter().flat_map(|of| [of.vector.x, of.vector.base]).collect()
            }
        }
    }

    /// The random masks that it draws.
    pub(crate) fn masks(&self) -> Vec<MaskName> {
        match self {
            Self::Thinned { sum, .. } => {
                let mask = |term: &ThinnedVector| match term.keep {
                    Keep::Masked(mask) => mask.random(),
                    Keep::All | Keep::Largest(_) => None,
                };
                sum.terms.iter().filter_map(mask).collect()
            }
            Self::Norms { mask, .. } => mask.random().into_iter().collect(),
            _ => Vec::new(),
        }
    }
}

/// Instructions in a row that one side of a select alone needs.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) instructions: Range<usize>,
    /// The mask of the select, which is known before them.
    pub(crate) mask: Slot,
    /// Whether it is the side where the mask is not 0.
    pub(crate) is_yes: bool,
}

/// Instructions of a side from which on it is worth a look at the mask whether any element takes it.
const LEAST_SIDE: usize = 3;

impl Side {
    /// Those of single-assignment operations.
    fn all(operations: &mut [Operation], last_use: &[usize]) -> Vec<Self> {
        let mut uses = vec![0; operations.len()];
        operations.iter_mut().for_each(|operation| operation.each_slot(|slot| uses[*slot] += 1));
        let mut sides = Vec::new();
        for (at, operation) in operations.iter().enumerate() {
            let Operation::Select { mask, yes, no } = *operation else { continue };
            for (side, is_yes) in [(yes, true), (no, false)] {
                let Argument::Slot(result) = side else { continue };
                if uses[result] != 1 || last_use[result] != at {
                    continue;
                }
                let is_own = |before: &usize| *before > mask && last_use[*before] <= result;
                let first = (0..result).rev().take_while(is_own).last().unwrap_or(result);
                if result > mask && result + 1 - first >= LEAST_SIDE {
                    sides.push(Self { instructions: first..result + 1, mask, is_yes });
                }
            }
        }
        sides
    }
}

/// Compiled effects.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) instructions: Vec<Instruction>,
    /// What need not be computed where no element of a chunk takes it.
    pub(crate) sides: Vec<Side>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) slots: usize,
    pub(crate) along: Along,
    /// What each reduction does, by number.
    pub(crate) kinds: Vec<ReductionKind>,
    /// What each search counts.
    pub(crate) searches: Vec<Interval>,
    /// How many samples it takes.
    pub(crate) samples: usize,
    /// How many rankings it makes.
    pub(crate) rankings: usize,
    /// Numbers by row or column that are put in at each step.
    pub(crate) vectors: Vec<Scalar>,
    /// What was kept of rankings; short vectors are ranked at each step.
    pub(crate) marks: Vec<Value>,
    /// The inputs that it reads, in order.
    pub(crate) inputs: Vec<usize>,
    pub(crate) double: bool,
}

impl Program {
    /// Maps single-assignment numbers to as few slots as the uses allow.
    pub(super) fn allocate(&mut self, operations: Vec<Operation>) {
        let mut last_use: Vec<usize> = (0..operations.len()).collect();
        let mut operations = operations;
        for (at, operation) in operations.iter_mut().enumerate() {
            operation.each_slot(|slot| last_use[*slot] = at);
        }
        for effect in &mut self.effects {
            effect.each_slot(|slot| last_use[*slot] = usize::MAX);
        }
        self.sides = Side::all(&mut operations, &last_use);
        let (mut home, mut free) = (vec![0; last_use.len()], Vec::new());
        for (at, mut operation) in operations.into_iter().enumerate() {
            // The result never shares a slot with an operand: kernels do not work in place.
            let out = free.pop().unwrap_or_else(|| {
                self.slots += 1;
                self.slots - 1
            });
            home[at] = out;
            let mut dead = Vec::new();
            operation.each_slot(|slot| {
                if last_use[*slot] == at && !dead.contains(&home[*slot]) {
                    dead.push(home[*slot]);
                }
                *slot = home[*slot];
            });
            free.extend(&dead);
            if last_use[at] == at {
                free.push(out);
            }
            self.instructions.push(Instruction { operation, out, dead });
        }
        for effect in &mut self.effects {
            effect.each_slot(|slot| *slot = home[*slot]);
        }
        self.sides.iter_mut().for_each(|side| side.mask = home[side.mask]);
    }

    /// The streams of the random masks that it draws.
    pub(crate) fn streams(&self) -> Vec<u32> {
        let instructions = self.instructions.iter().filter_map(|step| match step.operation {
            Operation::Mask { mask } | Operation::Drop { mask, .. } => {
                mask.random().map(|(stream, _)| stream)
            }
            _ => None,
        });
        let effects = self.effects.iter().flat_map(|effect| match effect {
            Effect::Fused(fused) => fused.masks().into_iter().map(|mask| mask.0).collect(),
            Effect::Rank { pick: Pick::Random { stream, .. }, .. } => vec![*stream],
            _ => Vec::new(),
        });
        instructions.chain(effects).collect()
    }

    /// Whether nothing is left to compute when bytes were copied.
    pub(crate) fn only_copies(&self) -> bool {
        self.effects.iter().all(|effect| matches!(effect, Effect::Copy { .. }))
    }
}

/// The inputs that are read, in order.
pub(super) fn inputs_of(operations: &[Operation], effects: &[Effect]) -> Vec<usize> {
    let mut inputs = Vec::new();
    for operation in operations {
        if let Operation::Load { input } | Operation::LoadDifference { input, .. } = operation {
            inputs.push(*input);
        }
    }
    for effect in effects {
        match effect {
            Effect::Copy { input, .. } => inputs.push(*input),
            Effect::Differing { inputs: both, .. } => inputs.extend(both),
            Effect::Fused(fused) => inputs.extend(fused.inputs()),
            _ => {}
        }
    }
    inputs.sort_unstable();
    inputs.dedup();
    inputs
}

fn each_slot_of(argument: &mut Argument, visit: &mut impl FnMut(&mut Slot)) {
    if let Argument::Slot(slot) = argument {
        visit(slot);
    }
}

impl Operation {
    pub(super) fn each_slot(&mut self, mut visit: impl FnMut(&mut Slot)) {
        match self {
            Self::Load { .. } | Self::Fill { .. } | Self::Spread { .. } | Self::Mask { .. } => {}
            Self::Unary { a, .. }
            | Self::Kept { a, .. }
            | Self::Trim { a, .. }
            | Self::Drop { a, .. } => visit(a),
            Self::LoadDifference { base, .. } => visit(base),
            Self::Binary { a, b, .. } => {
                each_slot_of(a, &mut visit);
                each_slot_of(b, &mut visit);
            }
            Self::Select { mask, yes, no } => {
                each_slot_of(yes, &mut visit);
                each_slot_of(no, &mut visit);
                visit(mask);
            }
            Self::WeightedSum { terms } | Self::Elect { terms, .. } => {
                terms.iter_mut().for_each(|(_, slot)| visit(slot));
            }
        }
    }
}

impl Effect {
    pub(super) fn each_slot(&mut self, mut visit: impl FnMut(&mut Slot)) {
        match self {
            Self::Copy { .. } | Self::Differing { .. } | Self::Fused(_) => {}
            Self::Store { a, .. }
            | Self::Count { a, .. }
            | Self::Keys { a, .. }
            | Self::Rank { a, .. } => each_slot_of(a, &mut visit),
            Self::Reduce { a, b, .. } => {
                each_slot_of(a, &mut visit);
                b.iter_mut().for_each(|b| each_slot_of(b, &mut visit));
            }
        }
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(slot) => write!(f, "s{slot}"),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random((stream, _)) => write!(f, "m{stream}"),
            Self::Marked(marks) => write!(f, "r{marks}"),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |terms: &[(f64, Slot)]| {
            let terms: Vec<_> = terms.iter().map(|(c, slot)| format!("{c} s{slot}")).collect();
            terms.join(" + ")
        };
        match self {
            Self::Load { input } => write!(f, "x{input}"),
            Self::LoadDifference { input, base } => write!(f, "x{input} - s{base}"),
            Self::Fill { number } => write!(f, "{number}"),
            Self::Spread { vector } => write!(f, "spread v{vector}"),
            Self::Unary { op, a } => write!(f, "{op:?} s{a}"),
            Self::Binary { op, a, b } => write!(f, "{op:?} {a} {b}"),
            Self::Select { mask, yes, no } => write!(f, "s{mask} ? {yes} : {no}"),
            Self::WeightedSum { terms } => f.write_str(&sum(terms)),
            Self::Elect { terms, average } => {
                write!(f, "{} {}", if *average { "elect mean" } else { "elect" }, sum(terms))
            }
            Self::Kept { a, .. } => write!(f, "among the largest s{a}"),
            Self::Trim { a, .. } => write!(f, "trim s{a}"),
            Self::Mask { mask } => write!(f, "mask {mask}"),
            Self::Drop { a, mask, scale } => write!(f, "{scale} drop {mask} s{a}"),
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store { output, dtype, a } => write!(f, "store o{output} {dtype} {a}"),
            Self::Copy { output, input } => write!(f, "copy o{output} x{input}"),
            Self::Reduce { number, kind, a, b: None } => write!(f, "n{number} = {kind:?} {a}"),
            Self::Reduce { number, kind, a, b: Some(b) } => {
                write!(f, "n{number} = {kind:?} {a} {b}")
            }
            Self::Differing { number, inputs: [a, b] } => {
                write!(f, "n{number} = differing x{a} x{b}")
            }
            Self::Count { search, a, .. } => write!(f, "count q{search} {a}"),
            Self::Keys { sample, a } => write!(f, "keys k{sample} {a}"),
            Self::Rank { ranking, among, pick, a } => {
                write!(f, "r{ranking} = {pick:?} in {among:?} {a}")
            }
            Self::Fused(fused) => write!(f, "{fused}"),
        }
    }
}

impl fmt::Display for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |terms: &[(f64, usize)]| {
            let terms: Vec<_> = terms.iter().map(|(c, x)| format!("{c} x{x}")).collect();
            terms.join(" + ")
        };
        match self {
            Self::WeightedSum { output, dtype, terms } => {
                write!(f, "fused store o{output} {dtype} {}", sum(terms))
            }
            Self::Shifted { output, dtype, base, terms, scale } => {
                write!(
                    f,
                    "fused store o{output} {dtype} x{base} + {scale} ({}) from it",
                    sum(terms)
                )
            }
            Self::Thinned { output, dtype, sum: ThinnedSum { base, terms, votes, lambda } } => {
                let term = |term: &ThinnedVector| {
                    let keep = match term.keep {
                        Keep::All => "all of".to_owned(),
                        Keep::Masked(mask) => format!("{mask} of"),
                        Keep::Largest(_) => "the largest of".to_owned(),
                    };
                    format!("{} {} {keep} x{}", term.weight, term.scale, term.x)
                };
                let terms: Vec<_> = terms.iter().map(term).collect();
                let terms = terms.join(", ");
                write!(f, "fused store o{output} {dtype} x{base} + {lambda} {votes:?} ({terms})")
            }
            Self::Products { numbers: [aa, ab, bb], inputs: [a, b] } => {
                write!(f, "fused n{aa}, n{ab}, n{bb} = products x{a} x{b}")
            }
            Self::Differences { numbers, inputs: [a, b] } => {
                let numbers = numbers.map(|number| format!("n{number}")).join(", ");
                write!(f, "fused {numbers} = differences x{b} - x{a}")
            }
            Self::Norms { whole, kept, vector: TaskVector { x, base }, mask } => {
                let whole = whole.map_or(String::new(), |whole| format!("n{whole}, "));
                write!(f, "fused {whole}n{kept} = norms x{x} - x{base}, {mask} of it")
            }
            Self::Count { search, vector: TaskVector { x, base }, .. } => {
                write!(f, "fused count q{search} |x{x} - x{base}|")
            }
            Self::Bracket { output, vectors } => {
                let vector =
                    |BracketedVector { vector: TaskVector { x, base }, search, .. }: &_| {
                        format!("q{search} |x{x} - x{base}|")
                    };
                let vectors: Vec<_> = vectors.iter().map(vector).collect();
                let vectors = vectors.join(", ");
                write!(f, "fused count, store o{output} BOOL between cuts of {vectors}")
            }
        }
    }
}

/// A line an instruction, then a line an effect.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Instruction { operation, out, .. } in &self.instructions {
            writeln!(f, "  s{out} = {operation}")?;
        }
        self.effects.iter().try_for_each(|effect| writeln!(f, "  {effect}"))
    }
}
