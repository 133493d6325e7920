//! Compiles the effects of a pass to a program.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};

use super::bind::Bindings;
use super::fuse;
use super::machine::{Known, Spans, TensorFrame};
use super::masks::Marks;
use super::program::{self, Along, Argument, Effect, Mask, Operation, Program, Setting, Slot};
use super::selection::Interval;
use super::stage::{Stage, operands, unknown, unknown_rows};
use super::{
    Among, BinaryOp, Ranking, Reduction, ReductionKind, Scalar, ScalarNode, Scope, Value, ValueNode,
};

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
    /// The next ranking.
    Rank(Arc<Ranking>),
}

impl Purpose {
    /// The values that it needs.
    pub(crate) fn values(&self) -> Vec<Value> {
        match self {
            Self::Store(value, _) | Self::Count(value, _) | Self::Keys(value) => {
                vec![value.clone()]
            }
            Self::Reduce(reduction) => operands(reduction),
            Self::Rank(ranking) => vec![ranking.value.clone()],
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
            return Err(missing(&unknown));
        }
        let Emitter { operations, vectors, marks, .. } = emitter;
        let (operations, effects) = if setting.fuses {
            fuse::fused(operations, effects, along, setting)
        } else {
            (operations, effects)
        };
        let inputs = program::inputs_of(&operations, &effects);
        let mut program = Self {
            instructions: Vec::new(),
            sides: Vec::new(),
            effects,
            slots: 0,
            along,
            kinds: seen.kinds,
            searches: seen.searches,
            samples: seen.samples,
            rankings: seen.rankings,
            vectors,
            marks,
            inputs,
            double: setting.double,
        };
        program.allocate(operations);
        Ok(program)
    }
}

#[cold]
fn missing(unknown: &str) -> Error {
    Error::plan("a formula needs a number that no pass can give")
        .found(unknown)
        .advice("see what a scalar may depend on, in rust/methods/ADDING.md")
}

/// What is given to a program for the elements of a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Given {
    /// Its vectors.
    pub(crate) vectors: Vec<Scalar>,
    /// Its marks.
    pub(crate) marks: Vec<Arc<Marks>>,
}

impl Given {
    /// What `program` needs, with what was found put in; `marks` are all that there are.
    fn of(program: &Program, found: &Bindings, marks: &[Arc<Marks>]) -> Self {
        let needed = found.bind_all(&program.marks).into_iter().map(|value| match *value.0 {
            ValueNode::Marked(which) => Arc::clone(&marks[which]),
            _ => unreachable!("what is marked was ranked before"),
        });
        Self { vectors: found.bind_scalars(&program.vectors), marks: needed.collect() }
    }
}

/// What is reduced and ranked by one program, before others need it.
#[derive(Clone, Debug)]
pub(crate) struct Level {
    reductions: Vec<Arc<Reduction>>,
    pub(crate) rankings: Vec<Arc<Ranking>>,
    pub(crate) program: Program,
}

/// A program, and the reductions and rankings by row or column that each of its steps needs first.
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    /// Each level needs only earlier ones.
    pub(crate) levels: Vec<Level>,
    /// What of whole vectors a step of them needs.
    pub(crate) among: Vec<Among>,
    pub(crate) program: Program,
    /// All inputs that they read, in order.
    pub(crate) inputs: Vec<usize>,
}

impl Staged {
    /// Elements that a step has at the least, to rank few vectors twice: those where two steps meet.
    pub(crate) fn least_step(&self, frame: &TensorFrame) -> u64 {
        if self.levels.iter().all(|level| level.rankings.is_empty()) {
            return 0;
        }
        frame.widest(&self.among).map_or(0, Spans::least_step)
    }

    /// Compiles effects that may need numbers by row.
    pub(crate) fn by_row(
        purposes: &[Purpose],
        along: Along,
        row: u64,
        setting: &Setting,
    ) -> Result<Self> {
        let values: Vec<Value> = purposes.iter().flat_map(Purpose::values).collect();
        Self::compile(purposes, along, unknown_rows(&values), Along::Segments(row), setting)
    }

    /// Compiles effects that need numbers by column.
    pub(crate) fn by_column(purposes: &[Purpose], along: Along, setting: &Setting) -> Result<Self> {
        let values: Vec<Value> = purposes.iter().flat_map(Purpose::values).collect();
        let mut waiting = unknown(&values);
        waiting.reductions.retain(|reduction| reduction.scope == Scope::Column);
        Self::compile(purposes, along, waiting, Along::Columns, setting)
    }

    fn compile(
        purposes: &[Purpose],
        along: Along,
        waiting: Stage,
        within: Along,
        setting: &Setting,
    ) -> Result<Self> {
        let Stage { mut reductions, mut rankings, .. } = waiting;
        let mut vectors: Vec<Among> = rankings.iter().map(|ranking| ranking.among).collect();
        if !reductions.is_empty() {
            vectors.push(Among::Row);
        }
        let (mut levels, mut known) = (Vec::new(), HashSet::new());
        while !reductions.is_empty() || !rankings.is_empty() {
            let is_known = |values: &[Value]| {
                let needs = unknown(values);
                let reductions = needs.reductions.iter().map(|needed| Arc::as_ptr(needed).cast());
                let rankings = needs.rankings.iter().map(|needed| Arc::as_ptr(needed).cast());
                reductions.chain(rankings).all(|needed: *const ()| known.contains(&needed))
            };
            let (reduced, rest): (Vec<_>, Vec<_>) =
                reductions.into_iter().partition(|reduction| is_known(&operands(reduction)));
            let (ranked, others): (Vec<_>, Vec<_>) = rankings
                .into_iter()
                .partition(|ranking| is_known(std::slice::from_ref(&ranking.value)));
            if let (true, true, Some(ranking)) =
                (reduced.is_empty(), ranked.is_empty(), others.first())
            {
                return Err(missing(&format!("{:?}", ranking.value)));
            }
            if reduced.is_empty() && ranked.is_empty() {
                // The program will say what it misses.
                break;
            }
            known.extend(reduced.iter().map(|reduction| Arc::as_ptr(reduction).cast()));
            known.extend(ranked.iter().map(|ranking| Arc::as_ptr(ranking).cast()));
            let purposes = reduced.iter().cloned().map(Purpose::Reduce);
            let purposes: Vec<Purpose> =
                purposes.chain(ranked.iter().cloned().map(Purpose::Rank)).collect();
            // What is only ranked has no segments.
            let within = if reduced.is_empty() { along } else { within };
            let program = Program::compile(&purposes, within, setting)?;
            levels.push(Level { reductions: reduced, rankings: ranked, program });
            (reductions, rankings) = (rest, others);
        }
        let program = Program::compile(purposes, along, setting)?;
        let programs = levels.iter().map(|level| &level.program).chain([&program]);
        let mut inputs: Vec<usize> =
            programs.flat_map(|program| &program.inputs).copied().collect();
        inputs.sort_unstable();
        inputs.dedup();
        Ok(Self { levels, among: vectors, program, inputs })
    }

    /// Runs the levels with `run`, which gives what each reduction of a level found by row or column,
    /// from `first` on, and what each of its rankings keeps; what then is given to the program
    /// itself. So much is `known` from earlier passes.
    pub(crate) fn given(
        &self,
        axis: Scope,
        first: u64,
        known: &Known,
        mut run: impl FnMut(&Level, &Given) -> Result<(Vec<Vec<f64>>, Vec<Arc<Marks>>)>,
    ) -> Result<Given> {
        let (mut found, mut marks) = (Bindings::default(), known.marks.clone());
        for level in &self.levels {
            let Level { reductions, rankings, program } = level;
            let (numbers, kept) = run(level, &Given::of(program, &found, &marks))?;
            for (reduction, numbers) in reductions.iter().zip(numbers) {
                found.reduction(reduction, Scalar::vector(axis, first, numbers));
            }
            for (ranking, kept) in rankings.iter().zip(kept) {
                found.ranking(ranking, marks.len());
                marks.push(kept);
            }
        }
        Ok(Given::of(&self.program, &found, &marks))
    }
}

/// What effects there were of each kind.
#[derive(Default)]
struct Seen {
    outputs: usize,
    kinds: Vec<ReductionKind>,
    searches: Vec<Interval>,
    samples: usize,
    rankings: usize,
}

/// Emits instructions in single-assignment form.
#[derive(Default)]
struct Emitter {
    operations: Vec<Operation>,
    done: HashMap<*const ValueNode, Argument>,
    loads: HashMap<usize, Slot>,
    vectors: Vec<Scalar>,
    spreads: HashMap<*const ScalarNode, Slot>,
    marks: Vec<Value>,
    /// The first scalar or selection that is not known.
    unknown: Option<String>,
}

/// The input that a value is, whose bytes are wanted and not its numbers.
fn stored(value: Option<&Value>) -> usize {
    match value.map(|value| &*value.0) {
        Some(ValueNode::Input(index)) => *index,
        _ => unreachable!("only inputs are compared as they are stored"),
    }
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
                if kind == ReductionKind::Differing {
                    let inputs = [Some(&reduction.left), reduction.right.as_ref()];
                    return Effect::Differing { number, inputs: inputs.map(stored) };
                }
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
            Purpose::Rank(ranking) => {
                let Ranking { among, pick, .. } = **ranking;
                let a = self.value(&ranking.value);
                Effect::Rank { ranking: next(&mut seen.rankings), among, pick, a }
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
            ValueNode::ByRank(_) | ValueNode::Marked(_) => {
                self.marks.push(value.clone());
                let mask = Mask::Marked(self.marks.len() - 1);
                Argument::Slot(self.emit(Operation::Mask { mask }))
            }
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
            ValueNode::Input(_)
            | ValueNode::Scalar(_)
            | ValueNode::ByRank(_)
            | ValueNode::Marked(_) => unreachable!("these are arguments"),
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
                Operation::Mask { mask: Mask::Random((*stream, *keep_below)) }
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
        for level in &self.levels {
            write!(f, "  first\n{}  then\n", level.program)?;
        }
        write!(f, "{}", self.program)
    }
}
