//! Compiles the effects of a pass to a program.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};

use super::bind::Bindings;
use super::fuse;
use super::program::{self, Along, Argument, Effect, Operation, Program, Setting, Slot};
use super::selection::Interval;
use super::stage::{operands, row_reductions, unknown};
use super::{BinaryOp, Reduction, ReductionKind, Scalar, ScalarNode, Scope, Value, ValueNode};

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

impl Program {
    /// Compiles effects; an error if they need a scalar that is not known when all passes are over.
    pub(crate) fn compile(purposes: &[Purpose], along: Along, setting: &Setting) -> Result<Self> {
        let mut emitter = Emitter::default();
        let mut seen = Seen::default();
        let effects = purposes.iter().map(|purpose| emitter.effect(purpose, &mut seen, setting));
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
        let inputs = program::inputs_of(&operations, &effects);
        let mut program = Self {
            instructions: Vec::new(),
            effects,
            slots: 0,
            along,
            kinds: seen.kinds,
            searches: seen.searches,
            samples: seen.samples,
            vectors,
            inputs,
            double: setting.double,
        };
        program.allocate(operations);
        Ok(program)
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

/// What effects there were of each kind.
#[derive(Default)]
struct Seen {
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
    fn effect(&mut self, purpose: &Purpose, seen: &mut Seen, setting: &Setting) -> Effect {
        match purpose {
            Purpose::Store(value, dtype) => {
                let (output, dtype) = (next(&mut seen.outputs), *dtype);
                match *value.0 {
                    ValueNode::Input(input) if setting.inputs[input] == dtype => {
                        Effect::Copy { output, input }
                    }
                    _ => Effect::Store { output, dtype, a: self.value(value) },
                }
            }
            Purpose::Reduce(reduction) => {
                let (number, kind) = (seen.kinds.len(), reduction.kind);
                seen.kinds.push(kind);
                let a = self.value(&reduction.left);
                let b = reduction.right.as_ref().map(|right| self.value(right));
                Effect::Reduce { number, kind, a, b }
            }
            Purpose::Count(value, interval) => {
                let (search, interval) = (seen.searches.len(), *interval);
                seen.searches.push(interval);
                Effect::Count { search, interval, a: self.value(value) }
            }
            Purpose::Keys(value) => {
                Effect::Keys { sample: next(&mut seen.samples), a: self.value(value) }
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
            ValueNode::Kept { value, which } => {
                Operation::Kept { a: self.slot(value), which: *which }
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

/// The levels, then the program.
impl fmt::Display for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (_, level) in &self.levels {
            write!(f, "  first\n{level}  then\n")?;
        }
        write!(f, "{}", self.program)
    }
}
