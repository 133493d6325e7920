//! Programs: what a pass over a tensor computes, compiled when the pass is entered.
//!
//! A program is a list of vector instructions and the *effects* that they are for: storing,
//! reducing, counting. One instruction does one operation on a chunk of elements. It is compiled in
//! single-assignment form, where the slot of a result is the number of its instruction; so
//! [`fuse`](super::fuse) can see what is made of what. Then slots are allocated: each is a buffer of
//! one chunk, used again as soon as its value was used for the last time, so that the whole working
//! set stays in the first-level cache.
//!
//! Numbers by row or column that are not known before a step is computed are *vectors* of the
//! program: who runs it supplies them for each step ([`Staged`]).

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};

use super::bind::Bindings;
use super::fuse::{self, Fused};
use super::selection::Interval;
use super::stage::{operands, row_reductions, unknown};
use super::{
    BinaryOp, Chosen, MaskName, Reduction, ReductionKind, Scalar, ScalarNode, Scope, UnaryOp,
    Value, ValueNode,
};

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
    Kept {
        a: Slot,
        chosen: Chosen,
    },
    /// What a cut of the magnitudes keeps, else 0.
    Trim {
        a: Slot,
        chosen: Chosen,
    },
    Random {
        mask: MaskName,
    },
    /// What a random mask keeps, else 0, times a number.
    Drop {
        a: Slot,
        mask: MaskName,
        scale: f64,
    },
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
    /// Counts for a search.
    Count { search: usize, interval: Interval, a: Argument },
    /// The order keys of each element. For the few elements of a sample.
    Keys { sample: usize, a: Argument },
    /// Does the work of effects and of the instructions that they alone needed.
    Fused(Fused),
}

/// An effect of a value, to be compiled.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    /// Into the next output.
    Store(Value, DType),
    /// The next number.
    Reduce(Arc<Reduction>),
    /// For the next search.
    Count(Value, Interval),
    /// The next sample.
    Keys(Value),
}

impl Purpose {
    /// The values that it needs.
    pub(crate) fn values(&self) -> Vec<Value> {
        match self {
            Self::Store(value, _) | Self::Count(value, _) | Self::Keys(value) => {
                vec![value.clone()]
            }
            Self::Reduce(reduction) => operands(reduction),
        }
    }
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

/// Compiled effects.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) slots: usize,
    pub(crate) along: Along,
    /// What each reduction does, by number.
    pub(crate) kinds: Vec<ReductionKind>,
    /// What each search counts.
    pub(crate) searches: Vec<Interval>,
    /// How many samples it takes.
    pub(crate) samples: usize,
    /// Numbers by row or column that are put in at each step.
    pub(crate) vectors: Vec<Scalar>,
    /// The inputs that it reads, in order.
    pub(crate) inputs: Vec<usize>,
    pub(crate) double: bool,
}

impl Program {
    /// Compiles effects; an error if they need a scalar that is not known when all passes are over.
    pub(crate) fn compile(purposes: &[Purpose], along: Along, setting: &Setting) -> Result<Self> {
        let mut emitter = Emitter::default();
        let mut places = Places::default();
        let effects = purposes.iter().map(|purpose| emitter.effect(purpose, &mut places, setting));
        let effects = effects.collect();
        if let Some(unknown) = emitter.unknown.take() {
            return Err(Error::plan("a formula needs a number that no pass can give")
                .found(unknown)
                .advice("see what a scalar may depend on, in rust/methods/ADDING.md"));
        }
        let Emitter { operations, vectors, .. } = emitter;
        let (operations, effects) = if setting.fuses {
            fuse::fused(operations, effects, along, setting)
        } else {
            (operations, effects)
        };
        let inputs = inputs_of(&operations, &effects);
        let mut program = Self {
            instructions: Vec::new(),
            effects,
            slots: 0,
            along,
            kinds: places.kinds,
            searches: places.searches,
            samples: places.samples,
            vectors,
            inputs,
            double: setting.double,
        };
        program.allocate(operations);
        Ok(program)
    }

    /// Maps single-assignment numbers to as few slots as the uses allow.
    fn allocate(&mut self, operations: Vec<Operation>) {
        let mut last_use: Vec<usize> = (0..operations.len()).collect();
        let mut operations = operations;
        for (at, operation) in operations.iter_mut().enumerate() {
            operation.each_slot(|slot| last_use[*slot] = at);
        }
        for effect in &mut self.effects {
            effect.each_slot(|slot| last_use[*slot] = usize::MAX);
        }
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
    }

    /// The streams of the random masks that it draws.
    pub(crate) fn streams(&self) -> Vec<u32> {
        let instructions = self.instructions.iter().filter_map(|step| match step.operation {
            Operation::Random { mask } | Operation::Drop { mask, .. } => Some(mask.0),
            _ => None,
        });
        let effects = self.effects.iter().flat_map(|effect| match effect {
            Effect::Fused(fused) => fused.masks(),
            _ => Vec::new(),
        });
        instructions.chain(effects.map(|mask| mask.0)).collect()
    }

    /// Whether nothing is left to compute when bytes were copied.
    pub(crate) fn only_copies(&self) -> bool {
        self.effects.iter().all(|effect| matches!(effect, Effect::Copy { .. }))
    }
}

/// A program, and the reductions by row or column that each of its steps needs first.
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    /// Each level needs only earlier ones.
    pub(crate) levels: Vec<(Vec<Arc<Reduction>>, Program)>,
    pub(crate) program: Program,
    /// All inputs that they read, in order.
    pub(crate) inputs: Vec<usize>,
}

impl Staged {
    /// A program whose vectors are known.
    pub(crate) fn of(program: Program) -> Self {
        let inputs = program.inputs.clone();
        Self { levels: Vec::new(), program, inputs }
    }

    /// Compiles effects that may need numbers by row.
    pub(crate) fn by_row(
        purposes: &[Purpose],
        along: Along,
        row: u64,
        setting: &Setting,
    ) -> Result<Self> {
        let values: Vec<Value> = purposes.iter().flat_map(Purpose::values).collect();
        let waiting = row_reductions(&values);
        Self::compile(purposes, along, waiting, Along::Segments(row), setting)
    }

    /// Compiles effects that need numbers by column.
    pub(crate) fn by_column(purposes: &[Purpose], along: Along, setting: &Setting) -> Result<Self> {
        let values: Vec<Value> = purposes.iter().flat_map(Purpose::values).collect();
        let mut waiting = unknown(&values).reductions;
        waiting.retain(|reduction| reduction.scope == Scope::Column);
        Self::compile(purposes, along, waiting, Along::Columns, setting)
    }

    fn compile(
        purposes: &[Purpose],
        along: Along,
        mut waiting: Vec<Arc<Reduction>>,
        within: Along,
        setting: &Setting,
    ) -> Result<Self> {
        let (mut levels, mut known) = (Vec::new(), HashSet::new());
        while !waiting.is_empty() {
            let is_ready = |reduction: &Arc<Reduction>| {
                let needs = unknown(&operands(reduction)).reductions;
                needs.iter().all(|needed| known.contains(&Arc::as_ptr(needed)))
            };
            let (ready, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(is_ready);
            if ready.is_empty() {
                // The program will say what it misses.
                break;
            }
            known.extend(ready.iter().map(Arc::as_ptr));
            let purposes: Vec<Purpose> = ready.iter().cloned().map(Purpose::Reduce).collect();
            levels.push((ready, Program::compile(&purposes, within, setting)?));
            waiting = rest;
        }
        let program = Program::compile(purposes, along, setting)?;
        let programs = levels.iter().map(|(_, level)| level).chain([&program]);
        let mut inputs: Vec<usize> =
            programs.flat_map(|program| &program.inputs).copied().collect();
        inputs.sort_unstable();
        inputs.dedup();
        Ok(Self { levels, program, inputs })
    }

    /// Runs the levels with `reduce`, which gives what each reduction of a program found by row or
    /// column, from `first` on; what then are the vectors of the program itself.
    pub(crate) fn vectors(
        &self,
        axis: Scope,
        first: u64,
        mut reduce: impl FnMut(&Program, &[Scalar]) -> Result<Vec<Vec<f64>>>,
    ) -> Result<Vec<Scalar>> {
        let mut known = Bindings::default();
        for (reductions, level) in &self.levels {
            let found = reduce(level, &known.bind_scalars(&level.vectors))?;
            for (reduction, found) in reductions.iter().zip(found) {
                known.reduction(reduction, Scalar::vector(axis, first, found));
            }
        }
        Ok(known.bind_scalars(&self.program.vectors))
    }
}

/// The inputs that are read, in order.
fn inputs_of(operations: &[Operation], effects: &[Effect]) -> Vec<usize> {
    let mut inputs = Vec::new();
    for operation in operations {
        if let Operation::Load { input } | Operation::LoadDifference { input, .. } = operation {
            inputs.push(*input);
        }
    }
    for effect in effects {
        match effect {
            Effect::Copy { input, .. } => inputs.push(*input),
            Effect::Fused(fused) => inputs.extend(fused.inputs()),
            _ => {}
        }
    }
    inputs.sort_unstable();
    inputs.dedup();
    inputs
}

/// What effects there were of each kind.
#[derive(Default)]
struct Places {
    outputs: usize,
    kinds: Vec<ReductionKind>,
    searches: Vec<Interval>,
    samples: usize,
}

/// Emits instructions in single-assignment form.
#[derive(Default)]
struct Emitter {
    operations: Vec<Operation>,
    done: HashMap<*const ValueNode, Argument>,
    loads: HashMap<usize, Slot>,
    vectors: Vec<Scalar>,
    spreads: HashMap<*const ScalarNode, Slot>,
    /// The first scalar or selection that is not known.
    unknown: Option<String>,
}

fn next(place: &mut usize) -> usize {
    *place += 1;
    *place - 1
}

impl Emitter {
    fn effect(&mut self, purpose: &Purpose, places: &mut Places, setting: &Setting) -> Effect {
        match purpose {
            Purpose::Store(value, dtype) => {
                let (output, dtype) = (next(&mut places.outputs), *dtype);
                match *value.0 {
                    ValueNode::Input(input) if setting.inputs[input] == dtype => {
                        Effect::Copy { output, input }
                    }
                    _ => Effect::Store { output, dtype, a: self.value(value) },
                }
            }
            Purpose::Reduce(reduction) => {
                let (number, kind) = (places.kinds.len(), reduction.kind);
                places.kinds.push(kind);
                let a = self.value(&reduction.left);
                let b = reduction.right.as_ref().map(|right| self.value(right));
                Effect::Reduce { number, kind, a, b }
            }
            Purpose::Count(value, interval) => {
                let (search, interval) = (places.searches.len(), *interval);
                places.searches.push(interval);
                Effect::Count { search, interval, a: self.value(value) }
            }
            Purpose::Keys(value) => {
                Effect::Keys { sample: next(&mut places.samples), a: self.value(value) }
            }
        }
    }

    fn value(&mut self, value: &Value) -> Argument {
        let key = Arc::as_ptr(&value.0);
        if let Some(&done) = self.done.get(&key) {
            return done;
        }
        let argument = match &*value.0 {
            ValueNode::Scalar(scalar) => self.scalar(scalar),
            ValueNode::Input(index) => Argument::Slot(self.load(*index)),
            node => {
                let operation = self.operation(node);
                Argument::Slot(self.emit(operation))
            }
        };
        self.done.insert(key, argument);
        argument
    }

    fn scalar(&mut self, scalar: &Scalar) -> Argument {
        if let Some(number) = scalar.as_constant() {
            return Argument::Number(number);
        }
        let axis = scalar.scope().filter(|axis| matches!(axis, Scope::Row | Scope::Column));
        if !axis.is_some_and(|axis| scalar.is_vector_of(axis)) {
            return self.unknown(format!("{scalar:?}"));
        }
        let key = Arc::as_ptr(&scalar.0);
        let slot = self.spreads.get(&key).copied().unwrap_or_else(|| {
            self.vectors.push(scalar.clone());
            let slot = self.emit(Operation::Spread { vector: self.vectors.len() - 1 });
            self.spreads.insert(key, slot);
            slot
        });
        Argument::Slot(slot)
    }

    fn load(&mut self, input: usize) -> Slot {
        if let Some(&slot) = self.loads.get(&input) {
            return slot;
        }
        let slot = self.emit(Operation::Load { input });
        self.loads.insert(input, slot);
        slot
    }

    fn operation(&mut self, node: &ValueNode) -> Operation {
        match node {
            ValueNode::Input(_) | ValueNode::Scalar(_) => unreachable!("these are arguments"),
            ValueNode::Unary(op, a) => Operation::Unary { op: *op, a: self.slot(a) },
            ValueNode::Binary(op, a, b) => {
                let (a, b) = (self.value(a), self.value(b));
                Operation::Binary { op: *op, a, b }
            }
            ValueNode::Select { mask, yes, no } => {
                let mask = self.slot(mask);
                let (yes, no) = (self.value(yes), self.value(no));
                Operation::Select { mask, yes, no }
            }
            ValueNode::WeightedSum(terms) => self.weighted_sum(terms),
            ValueNode::Elect { terms, average } => {
                let terms = terms.iter().map(|(w, value)| (*w, self.slot(value))).collect();
                Operation::Elect { terms, average: *average }
            }
            ValueNode::Keep(_) => {
                self.unknown("a selection".to_owned());
                Operation::Fill { number: f64::NAN }
            }
            ValueNode::Kept { value, chosen } => {
                Operation::Kept { a: self.slot(value), chosen: *chosen }
            }
            ValueNode::Random { keep_below, stream } => {
                Operation::Random { mask: (*stream, *keep_below) }
            }
        }
    }

    /// One instruction, or products and sums where a coefficient differs by row or column.
    fn weighted_sum(&mut self, terms: &[(Scalar, Value)]) -> Operation {
        let numbers: Option<Vec<f64>> = terms.iter().map(|(c, _)| c.as_constant()).collect();
        if let Some(numbers) = numbers {
            let slots: Vec<Slot> = terms.iter().map(|(_, value)| self.slot(value)).collect();
            return Operation::WeightedSum { terms: numbers.into_iter().zip(slots).collect() };
        }
        let mut sum: Option<Slot> = None;
        for (coefficient, value) in terms {
            let (a, b) = (self.scalar(coefficient), self.value(value));
            let product = self.emit(Operation::Binary { op: BinaryOp::Mul, a, b });
            sum = Some(match sum {
                None => product,
                Some(sum) => {
                    let (a, b) = (Argument::Slot(sum), Argument::Slot(product));
                    self.emit(Operation::Binary { op: BinaryOp::Add, a, b })
                }
            });
        }
        assert!(sum.is_some(), "a weighted sum has a term");
        // The last addition is emitted again by the caller as its own result.
        self.operations.pop().unwrap_or(Operation::Fill { number: 0.0 })
    }

    fn unknown(&mut self, what: String) -> Argument {
        self.unknown.get_or_insert(what);
        Argument::Number(f64::NAN)
    }

    fn slot(&mut self, value: &Value) -> Slot {
        match self.value(value) {
            Argument::Slot(slot) => slot,
            Argument::Number(number) => self.emit(Operation::Fill { number }),
        }
    }

    fn emit(&mut self, operation: Operation) -> Slot {
        self.operations.push(operation);
        self.operations.len() - 1
    }
}

fn each_slot_of(argument: &mut Argument, visit: &mut impl FnMut(&mut Slot)) {
    if let Argument::Slot(slot) = argument {
        visit(slot);
    }
}

impl Operation {
    pub(super) fn each_slot(&mut self, mut visit: impl FnMut(&mut Slot)) {
        match self {
            Self::Load { .. } | Self::Fill { .. } | Self::Spread { .. } | Self::Random { .. } => {}
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
            Self::Copy { .. } | Self::Fused(_) => {}
            Self::Store { a, .. } | Self::Count { a, .. } | Self::Keys { a, .. } => {
                each_slot_of(a, &mut visit);
            }
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
            Self::Random { mask: (stream, _) } => write!(f, "random m{stream}"),
            Self::Drop { a, mask: (stream, _), scale } => write!(f, "{scale} drop m{stream} s{a}"),
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
            Self::Count { search, a, .. } => write!(f, "count q{search} {a}"),
            Self::Keys { sample, a } => write!(f, "keys k{sample} {a}"),
            Self::Fused(fused) => write!(f, "{fused}"),
        }
    }
}

/// A line an instruction, then a line an effect.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Instruction { operation, out, .. } in &self.instructions {
            writeln!(f, "s{out} = {operation}")?;
        }
        self.effects.iter().try_for_each(|effect| writeln!(f, "{effect}"))
    }
}
